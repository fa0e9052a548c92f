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
LIMITS = ["--ulimit", "nofile=1024:4096", "--ulimit", "nproc=1000:1000"]
"""Podman's own are more than a sandbox may have."""

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


class Containers:
    """Images and containers of their own, below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        store = ["--root", str(folder / "images"), "--runroot", str(folder / "run")]
        self._buildah = ["buildah", "--storage-driver", "overlay", *store]
        self._podman = ["podman", "--storage-driver", "overlay", *store]
        self._podman += ["--cgroup-manager", "cgroupfs", "--runtime", "runc"]
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
        self._take_kubectl(root)
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, root, "/")
        self.buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
        self.buildah("commit", "--quiet", "--rm", container, image)
        shutil.rmtree(root)

    def _take_kubectl(self, root: Path) -> None:
        """That of this Debian; older ones have one that is too old."""
        run("chroot", root, "sh", "-ec", "cd /tmp && apt-get download --quiet kubectl")
        [package] = (root / "tmp").glob("kubectl_*.deb")
        run("dpkg", "-x", package, self.folder / "kubectl")
        package.unlink()

    def kubectl(self, *arguments: str | Path) -> str:
        return run(self.folder / "kubectl/usr/bin/kubectl", *arguments)

    @property
    def _build(self) -> list[str]:
        chroot = ["bud", "--isolation", "chroot", "--network", "host", "--format", "docker"]
        return [*self._buildah, *chroot, "--pull-never", "--layers"]

    @property
    def _run(self) -> list[str]:
        return [*self._podman, "run", "--pull=never", "--network", "host", *LIMITS]

    def build(self, folder: Path, target: str, *options: str) -> str:
        """The name of the image that `folder` becomes."""
        image = f"localhost/{folder.name}:{target}"
        secret = f"id=pip,src={self._pip_conf}"
        named = ["--target", target, "--tag", image, "--secret", secret]
        run(*self._build, *named, *options, folder)
        return image

    def engine(self) -> dict[str, str]:
        """For a Makefile that builds and runs images: what docker would be."""
        script = self.folder / "engine"
        build, run = shlex.join(self._build), shlex.join(self._run)
        # There is no network but the host's, where a port is chosen by the service.
        script.write_text(
            "#!/bin/sh\ncommand=$1; shift\ncase $command in\n"
            f'build) exec {build} "$@" ;;\n'
            f'run) exec {run} --env PORT="$PORT" --env BIND_ADDRESS=127.0.0.1 "$@" ;;\n'
            "esac\n"
        )
        script.chmod(0o755)
        return {"ENGINE": str(script), "PIP_CONF": str(self._pip_conf)}

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

    def exit_code(self) -> int:
        """Of the service, once it has ended."""
        return int(self._podman("wait", self.name))
