"""From a fresh clone to a picture, or to a tested clone, in one command. Needs nothing but Python 3.10 or newer.

    python quickstart.py          make .venv, install, train a LoRA on the shipped model, draw with and without it
    python quickstart.py --test   make .venv, install, run the tests

Options: --torch VERSION, --torch-index-url URL (another build of torch), --reinstall.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed.json"
OLDEST = (3, 10)
OLDEST_PIP = (23, 1)
NEEDED_GIB = 4
EXAMPLE = "examples/quickstart"
OUTPUT = "quickstart-output"

NETWORK_SIGNS = (
    "NewConnectionError",
    "NameResolutionError",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "getaddrinfo failed",
    "Max retries exceeded",
    "ProxyError",
    "ReadTimeoutError",
    "ConnectTimeoutError",
    "Connection refused",
)
DISK_SIGNS = ("No space left on device", "Errno 28", "There is not enough space on the disk")


class Stop(Exception):
    """Something that the user has to mend: one line, exit 1."""


def say(text):
    """Print a line at once."""
    print(text, flush=True)


def check_machine():
    """Stop early where the installation cannot succeed."""
    if sys.version_info < OLDEST:
        found = ".".join(str(part) for part in sys.version_info[:3])
        raise Stop(f"Python {found} is too old: install Python 3.10 to 3.13 and run this again with it")


def check_disk():
    """Stop before a first installation that would fill the disk."""
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEEDED_GIB:
        raise Stop(f"only {free:.1f} GiB free on the disk of {ROOT}: free {NEEDED_GIB} GiB and run this again")


def venv_python():
    """The interpreter inside .venv."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv():
    """Make .venv unless a working one is there."""
    if venv_python().exists():
        check = subprocess.run([str(venv_python()), "-m", "pip", "--version"], capture_output=True, text=True)
        if check.returncode == 0:
            return
        say(f"{VENV} does not work, making it again")
        shutil.rmtree(VENV, ignore_errors=True)
    check_disk()
    say(f"making {VENV}")
    try:
        venv.EnvBuilder(with_pip=True, clear=VENV.exists()).create(VENV)
    except OSError as error:
        raise Stop(f"{VENV} cannot be made: {error.strerror or error}") from None
    except subprocess.CalledProcessError:
        shutil.rmtree(VENV, ignore_errors=True)
        raise Stop(
            "this Python has no ensurepip: install its venv package (Debian: apt install python3-venv)"
        ) from None


def environment():
    """Environment of every command: no user site packages, UTF-8 everywhere."""
    return {**os.environ, "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def pip(*arguments):
    """Run pip in .venv; its failure becomes one line that says what to do."""
    command = [str(venv_python()), "-m", "pip", *arguments, "--no-input"]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT, env=environment())
    if result.returncode == 0:
        return result.stdout
    text = result.stdout + result.stderr
    if any(sign in text for sign in DISK_SIGNS):
        raise Stop("the disk is full: free some room and run this again (what is installed stays)")
    if any(sign in text for sign in NETWORK_SIGNS):
        raise Stop("the package index cannot be reached: check the network (or proxy) and run this again")
    errors = [line for line in text.splitlines() if line.startswith("ERROR")] or text.splitlines()[-3:]
    raise Stop(f"pip {arguments[0]} failed: {' '.join(errors)[:600]}")


def installed_torch():
    """Version of the torch in .venv, or None."""
    code = "import importlib.metadata as m; print(m.version('torch'))"
    result = subprocess.run([str(venv_python()), "-c", code], capture_output=True, text=True, env=environment())
    return result.stdout.strip() if result.returncode == 0 else None


def pinned_torch():
    """Version of torch in constraints.txt."""
    return re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE).group(1)


def stamp_of(options, with_tests):
    """What an installation depends on; equal stamps mean that nothing is to be installed."""
    digest = hashlib.sha256()
    files = ["requirements.txt", "constraints.txt", *(["pyproject.toml"] if with_tests else [])]
    for name in files:
        digest.update((ROOT / name).read_bytes())
    digest.update(repr((sys.version_info[:2], options.torch, options.torch_index_url)).encode())
    return digest.hexdigest()


def install(options, with_tests):
    """Install what is missing: torch first, so that nothing else chooses its build."""
    kind, stamp = ("test" if with_tests else "base"), stamp_of(options, with_tests)
    stamps = json.loads(STAMP.read_text(encoding="utf-8")) if STAMP.exists() else {}
    if stamps.get(kind) == stamp and not options.reinstall:
        return
    check_disk()
    started = time.monotonic()
    version = re.match(r"pip (\d+)\.(\d+)", pip("--version"))
    if version and tuple(map(int, version.groups())) < OLDEST_PIP:
        say("installing a newer pip")
        pip("install", "--quiet", "--upgrade", "pip")
    install_torch(options)
    constraints = write_constraints()
    say("installing the requirements (some minutes)")
    pip("install", "--quiet", "-r", "requirements.txt", "-c", str(constraints))
    stamps["base"] = stamp_of(options, False)
    if with_tests:
        say("installing what the tests need")
        pip("install", "--quiet", *test_requirements(), "-c", str(constraints))
        stamps["test"] = stamp
    STAMP.write_text(json.dumps(stamps), encoding="utf-8")
    say(f"installed in {time.monotonic() - started:.0f} s")


def install_torch(options):
    """The torch that was asked for; else the one that is there; else the tested one."""
    have = installed_torch()
    if have and not (options.torch or options.torch_index_url):
        return
    wanted = options.torch or pinned_torch()
    source = ["--index-url", options.torch_index_url] if options.torch_index_url else []
    say(f"installing torch {wanted} (200 MB to 3 GB, by its build)")
    pip("install", "--quiet", f"torch=={wanted}", *source)


def write_constraints():
    """The tested set with the torch that is installed, so that no other build is dragged in."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    target = VENV / "constraints.txt"
    target.write_text(re.sub(r"(?m)^torch==.*$", f"torch=={installed_torch()}", text), encoding="utf-8")
    return target


def test_requirements():
    """The test extra of pyproject.toml, read with the toml package that is installed by now."""
    code = "import toml; print('\\n'.join(toml.load('pyproject.toml')['project']['optional-dependencies']['test']))"
    result = subprocess.run([str(venv_python()), "-c", code], capture_output=True, text=True, cwd=ROOT)
    return result.stdout.split("\n")[:-1]


def call(what, *arguments):
    """Run a Python command of the project with its output shown; stop when it fails."""
    say(f"\n== {what}\n$ python {' '.join(arguments)}")
    result = subprocess.run([str(venv_python()), *arguments], cwd=ROOT, env=environment())
    if result.returncode:
        raise Stop(f"{what} failed with exit code {result.returncode}; its message stands above")


def demo():
    """Train, draw without and with the result, and put the pictures side by side."""
    started = time.monotonic()
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", str(cores())]
    call("training a LoRA", *launch, "train_network.py", "--config_file", f"{EXAMPLE}/train.toml")
    draw = ["gen_img_diffusers.py", "--ckpt", f"{EXAMPLE}/model", "--from_file", f"{EXAMPLE}/prompts.txt"]
    draw += ["--W", "64", "--H", "64", "--steps", "20", "--scale", "3", "--sampler", "ddim", "--batch_size", "8"]
    lora = ["--network_module", "networks.lora", "--network_weights", f"{OUTPUT}/heart.safetensors"]
    call("drawing without it", *draw, "--outdir", f"{OUTPUT}/without")
    call("drawing with it", *draw, *lora, "--outdir", f"{OUTPUT}/with")
    folders = ["--before", f"{OUTPUT}/without", "--after", f"{OUTPUT}/with"]
    sheet = ["--prompts", f"{EXAMPLE}/prompts.txt", "--output", f"{OUTPUT}/before_after.png"]
    call("putting the pictures side by side", f"{EXAMPLE}/compare.py", *folders, *sheet)
    say(f"\ndone in {time.monotonic() - started:.0f} s: look at {ROOT / OUTPUT / 'before_after.png'}")
    say("next: README.md has a table of tasks, docs/train_network.md trains on your own pictures")


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tests(pytest_arguments):
    """Run the suite, one worker a core; its exit code is ours."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [str(venv_python()), "-m", "pytest", "-n", str(min(cores(), 8)), *pytest_arguments]
    return subprocess.run(command, cwd=ROOT, env={**environment(), **threads}).returncode


def parse_arguments():
    """Options of this script; what follows `--` goes to pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", action="store_true", help="install the test extras and run the tests")
    parser.add_argument("--torch", metavar="VERSION", help="version of torch instead of the tested one")
    parser.add_argument("--torch-index-url", metavar="URL", help="package index of another build of torch")
    parser.add_argument("--reinstall", action="store_true", help="install again even when nothing changed")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    return parser.parse_args()


def main():
    """Install, then the demo or the tests."""
    options = parse_arguments()
    check_machine()
    make_venv()
    install(options, with_tests=options.test)
    if options.test:
        return run_tests(options.pytest)
    demo()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        sys.exit(1)
    except OSError as problem:
        print(f"error: {problem.strerror or problem} ({problem.filename or ROOT})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
