"""Makes .venv ready: `python bootstrap.py core` for running, `dev` for tests too.

Standard library only, and it parses on any Python, so that an old one gets a
sentence, not a traceback. What is ready already costs nothing; a half-made
environment is completed; a torch that is there and recent enough is kept.
"""

import hashlib
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
OLDEST = (3, 11)


def main(group):
    check_this_python()
    stamp = os.path.join(VENV, ".ready-" + group)
    wanted = fingerprint()
    if stamped(stamp) == wanted and works(PYTHON):
        return
    if not works(PYTHON):
        make_venv()
    say("installing Based into .venv; the first time takes a minute or more, for PyTorch")
    install(group)
    with open(stamp, "w") as file:
        file.write(wanted)


def check_this_python():
    if sys.version_info[:2] < OLDEST:
        stop(
            "Based needs Python 3.11 or newer and this is %d.%d; name another one: "
            "make PYTHON=/path/to/python3.12 demo" % sys.version_info[:2]
        )
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop(
            "this Python has no venv module; install it (Debian, Ubuntu: apt install "
            "python%d.%d-venv), or name another Python: make PYTHON=/path/to/python3 demo"
            % sys.version_info[:2]
        )


def fingerprint():
    """Changes with the requirements, so that an old environment is brought up to date."""
    digest = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def stamped(path):
    """What the last finished installation wrote; None if none finished."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


def works(python):
    """Whether there is a Python with pip at that path."""
    try:
        return subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def make_venv():
    """A fresh .venv; it sees this Python's packages if those have a torch that will do."""
    command = [sys.executable, "-m", "venv", "--clear", VENV]
    if torch_in_range(torch_version(sys.executable)):
        command.insert(-1, "--system-site-packages")
    if subprocess.call(command) != 0:
        stop("could not make .venv; the lines above say why")


def install(group):
    import tomllib

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        groups = tomllib.load(file)["dependency-groups"]
    what = ["-e", ROOT] if group == "core" else ["-e", ROOT + "[triton]"] + groups[group]
    constraints = os.path.join(VENV, "constraints.txt")
    with open(constraints, "w") as file:
        file.write(pins())
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "install"]
    if subprocess.call(pip + ["-c", constraints] + what) != 0:
        stop("the installation failed; the lines above say why. The same command tries again")


def pins():
    """constraints.txt, but a torch that is there and in range is pinned as it is."""
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        ours = file.readlines()
    version = torch_version(PYTHON)
    if not torch_in_range(version):
        return "".join(ours)
    say("keeping the torch %s that is there" % version)
    # A CUDA build of torch asks for the Triton that it was made with.
    rest = [] if brings_triton(PYTHON) else [line for line in ours if not line.startswith("torch=")]
    return "torch==%s\n" % version + "".join(rest)


def brings_triton(python):
    """Whether the torch that is there names a Triton of its own."""
    return "triton" in ask(python, "print(m.requires('torch'))")


def torch_version(python):
    return ask(python, "print(m.version('torch'))") or None


def ask(python, code):
    """What that Python prints of the packages that it has; nothing if it cannot."""
    command = [python, "-c", "import importlib.metadata as m; " + code]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def torch_in_range(version):
    """Whether pyproject.toml's range admits that version."""
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        oldest = re.search(r'"torch>=([\d.]+)"', file.read()).group(1)
    return version is not None and numbers(version) >= numbers(oldest)


def numbers(version):
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def say(text):
    print("based: " + text)
    sys.stdout.flush()


def stop(text):
    sys.stderr.write("based: " + text + "\n")
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
