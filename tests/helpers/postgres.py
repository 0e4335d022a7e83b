"""A PostgreSQL server of Debian's package for tests: a cluster in a temporary folder, on a port of its own.

Where the package is missing it is installed with apt-get, by root. FST_REQUIRE_POSTGRES=1 makes it a failure that there
is none.
"""

import os
import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRE = "FST_REQUIRE_POSTGRES"
USER = "postgres"
MISSING = f"NO POSTGRESQL, and apt-get did not bring it: its tests were skipped ({REQUIRE}=1 insists)"


def need_postgres():
    """The folder of initdb and pg_ctl."""
    folder = _programs() or _installed()
    if folder is None:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    return folder


def _programs():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def _installed():
    if os.geteuid() or shutil.which("apt-get") is None:
        return None
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends"]
    for command in (["apt-get", "update"], [*install, "postgresql-common"], [*install, "postgresql"]):
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
        if done.returncode:
            return None
        if command[-1] == "postgresql-common":
            # Debian would make a cluster of its own, and start it.
            with Path("/etc/postgresql-common/createcluster.conf").open("a") as file:
                file.write("create_main_cluster = false\n")
    return _programs()


@contextmanager
def postgres(programs, folder):
    """The URL of an empty database; the server is stopped at the end."""
    folder.mkdir(parents=True)
    as_user = {}
    if not os.geteuid():  # the server refuses to run as root
        as_user = {"user": USER}
        shutil.chown(folder, USER)
    port = _free_port()
    data, log = folder / "data", folder / "log"

    def run(program, *arguments):
        command = [str(programs / program), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, **as_user
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    run("initdb", "-D", data, "-A", "trust", "-U", USER, "--no-sync")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "start")
    try:
        yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


def _free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
