"""Images and containers without an engine: buildah builds, podman and runc run.

The base image is not pulled. A bootstrapped Debian with the same Python stands in for it, under
its name, and trusts whom this machine trusts.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

TOOLS = ("buildah", "podman", "runc", "debootstrap")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
RUNTIME = """#!/usr/bin/python3
# runc, without podman's limits, which are more than a sandbox may have.
import json, os, sys

def argument(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None

bundle, process = argument("--bundle"), argument("--process")
path = os.path.join(bundle, "config.json") if bundle else process
if path:
    with open(path) as file:
        config = json.load(file)
    config.get("process", config).pop("rlimits", None)
    with open(path, "w") as file:
        json.dump(config, file)
os.execvp("runc", ["runc", *sys.argv[1:]])
"""
PIP_CONF = f"[global]\ncert = {CERTIFICATES}\n"


def missing_tools() -> list[str]:
    """What is missing here to build and run images; root on a Debian is needed, too."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if not re.search("^ID=debian$", Path("/etc/os-release").read_text(), re.MULTILINE):
        missing.append("Debian")
    return missing + (["root"] if os.geteuid() else [])


def run(*command: str | Path, folder: Path | None = None, check: bool = True) -> str:
    """What it prints, errors included."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


class Containers:
    """Images and containers of their own, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        store = ["--root", str(folder / "images"), "--runroot", str(folder / "run")]
        self._buildah = ["buildah", "--storage-driver", "overlay", *store]
        self._podman = ["podman", "--storage-driver", "overlay", *store]
        runtime = executable(folder / "runtime", RUNTIME)
        self._podman += ["--cgroup-manager", "cgroupfs", "--runtime", str(runtime)]
        self._pip_conf = folder / "pip.conf"
        self._pip_conf.write_text(PIP_CONF)

    def buildah(self, *arguments: str | Path) -> str:
        return run(*self._buildah, *arguments)

    def podman(self, *arguments: str | Path, check: bool = True) -> str:
        return run(*self._podman, *arguments, check=check)

    def make_base(self, image: str) -> None:
        """Have `image`, which is named like python:3.13-slim-trixie."""
        found = re.fullmatch(r".*/python:\d+\.\d+-slim-(\w+)", image)
        assert found, image
        root = self.folder / "root"
        sites = run("apt-get", "indextargets", "--format", "$(SITE)").split()
        mirror = next(site for site in sites if "security" not in site)
        options = ["--variant=minbase", f"--include={PACKAGES}"]
        run("debootstrap", *options, found[1], root, mirror)
        shutil.copy(CERTIFICATES, root / CERTIFICATES.relative_to("/"))
        # An emptyDir is for all to write to; podman gives it the mode of what it hides.
        (root / "dev/shm").chmod(0o1777)
        self._take_kubectl(root)
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, root, "/")
        self.buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
        self.buildah("commit", "--quiet", "--rm", container, image)
        shutil.rmtree(root)

    def make_valkey(self, base: str, image: str) -> None:
        """Have `image`, with the Valkey of `base`, which is a Debian."""
        self._install(base, "valkey-server", image, "--entrypoint", "[]")

    def make_prometheus(self, base: str, image: str) -> None:
        """Have `image`, with the Prometheus of `base`, as Prometheus's own image has it."""
        folder = "mkdir /prometheus && chown nobody /prometheus"
        own = ["--entrypoint", '["/usr/bin/prometheus"]', "--user", "nobody"]
        self._install(base, "prometheus", image, *own, then=folder)

    def _install(self, base: str, package: str, image: str, *config: str, then: str = ":") -> None:
        container = self.buildah("from", "--pull-never", base).strip()
        install = f"apt-get update && apt-get install --yes --no-install-recommends {package}"
        options = ["--isolation", "chroot", "--network", "host"]
        self.buildah("run", *options, container, "--", "sh", "-ec", f"{install} && {then}")
        self.buildah("config", *config, container)
        self.buildah("commit", "--quiet", "--rm", container, image)

    def _take_kubectl(self, root: Path) -> None:
        """That of this Debian; older ones have one that is too old."""
        run("chroot", root, "sh", "-ec", "cd /tmp && apt-get download --quiet kubectl")
        [package] = (root / "tmp").glob("kubectl_*.deb")
        run("dpkg", "-x", package, self.folder / "kubectl")
        package.unlink()

    @property
    def kubectl_path(self) -> Path:
        return self.folder / "kubectl/usr/bin"

    def kubectl(self, *arguments: str | Path) -> str:
        return run(self.kubectl_path / "kubectl", *arguments)

    @property
    def _build(self) -> list[str]:
        chroot = ["bud", "--isolation", "chroot", "--network", "host", "--format", "docker"]
        return [*self._buildah, *chroot, "--pull-never", "--layers"]

    @property
    def _run(self) -> list[str]:
        return [*self._podman, "run", "--pull=never", "--network", "host"]

    def build(self, folder: Path, target: str, *options: str) -> str:
        """The name of the image that `folder` becomes."""
        image = f"localhost/{folder.name}:{target}"
        secret = f"id=pip,src={self._pip_conf}"
        named = ["--target", target, "--tag", image, "--secret", secret]
        run(*self._build, *named, *options, folder)
        return image

    def engine(self) -> dict[str, str]:
        """For a Makefile that builds and runs images: what docker would be."""
        build, run = shlex.join(self._build), shlex.join(self._run)
        # There is no network but the host's, where a port is chosen by the service.
        script = (
            "#!/bin/sh\ncommand=$1; shift\ncase $command in\n"
            f'build) exec {build} "$@" ;;\n'
            f'run) exec {run} --env PORT="$PORT" --env BIND_ADDRESS=127.0.0.1 "$@" ;;\n'
            "esac\n"
        )
        engine = executable(self.folder / "engine", script)
        return {"ENGINE": str(engine), "PIP_CONF": str(self._pip_conf)}

    def compose(self, folder: Path, *arguments: str | Path) -> str:
        """podman-compose, in `folder`."""
        podman = executable(
            self.folder / "podman", f'#!/bin/sh\nexec {shlex.join(self._podman)} "$@"\n'
        )
        secret = f"--secret=id=pip,src={self._pip_conf}"
        build = f"--isolation=chroot --network=host --format=docker --pull=never {secret}"
        options = [f"--podman-path={podman}", "--in-pod=false", f"--podman-build-args={build}"]
        return run("podman-compose", *options, *arguments, folder=folder)

    @contextmanager
    def files(self, image: str) -> Iterator[Path]:
        """The root of `image`."""
        container = self.buildah("from", "--pull-never", image).strip()
        try:
            yield Path(self.buildah("mount", container).strip())
        finally:
            self.buildah("rm", container)

    @contextmanager
    def running(
        self, image: str, *options: str, command: Sequence[str] = (), **environment: str
    ) -> Iterator["Container"]:
        """`image`, as a locked-down cluster runs it."""
        name = f"test-{uuid4().hex[:8]}"
        locked = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL"]  # noqa: S108
        locked += ["--security-opt", "no-new-privileges"]
        given = [f"--env={key}={value}" for key, value in environment.items()]
        run(*self._run, "--detach", "--name", name, *locked, *given, *options, image, *command)
        try:
            yield Container(self, name)
        finally:
            self.podman("rm", "--force", name)

    @contextmanager
    def playing(self, manifests: Path, deployment: str) -> Iterator["Container"]:
        """The one container of the Deployment in `manifests`."""
        self.podman("kube", "play", "--network", "host", manifests)
        try:
            yield Container(self, f"{deployment}-pod-0-service")
        finally:
            self.podman("kube", "down", manifests)


class Container:
    def __init__(self, containers: Containers, name: str) -> None:
        self._podman = containers.podman
        self.name = name

    @property
    def log(self) -> str:
        return self._podman("logs", self.name)

    def execute(self, *command: str) -> str:
        return self._podman("exec", self.name, *command)

    def signal(self, name: str) -> None:
        self._podman("kill", "--signal", name, self.name)

    def stop(self, grace_s: int) -> None:
        """SIGTERM, and SIGKILL if it has not ended in so many seconds."""
        self._podman("stop", "--time", str(grace_s), self.name)

    @property
    def restarts(self) -> int:
        return int(self._podman("inspect", "--format", "{{.RestartCount}}", self.name))

    def exit_code(self) -> int:
        """Of the service, once it has ended."""
        return int(self._podman("wait", self.name))
