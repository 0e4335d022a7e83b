"""Where a study is stored, and how trials of killed workers are tried again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna import storages
from optuna.storages import journal

from fst_optimizer.errors import UserError
from fst_optimizer.keys import keep_secrets_of, without_address_secrets, without_secrets

HEARTBEAT_S = 20
"""Seconds between two signs of life of a worker."""
MISSED = 3
"""Signs of life that are missing before a worker is taken for dead."""
CONNECT_S = 10
"""How long a database server may take to answer, in seconds."""
BUSY_S = 60
"""How long SQLite waits for another writer, in seconds."""
RETRIES = 3
"""How often a trial is tried again after its worker was killed."""
RUNGS = "completed_rung_"
"""The prefix of what Optuna's successive halving keeps of a trial."""


def open_storage(url: str, heartbeat_s: int = HEARTBEAT_S) -> storages.BaseStorage:
    """The storage at a URL.

    `sqlite:///FILE`, `postgresql://USER:PASSWORD@HOST/DB` and `mysql://...` have heartbeats: trials of killed workers
    are found and tried again. `journal:FILE`, `redis://HOST` and `grpc://HOST:PORT` have none.

    Raises:
        UserError: it cannot be reached; a password in the URL is not repeated.
    """
    keep_secrets_of(url)
    try:
        with quiet_optuna():
            if has_heartbeat(url):
                return _database(url, heartbeat_s)
            scheme, _, place = url.partition(":")
            if scheme == "journal":
                return storages.JournalStorage(journal.JournalFileBackend(place))
            if scheme == "grpc":
                host, _, port = place.removeprefix("//").rpartition(":")
                return storages.GrpcStorageProxy(host=host, port=int(port))
            return storages.JournalStorage(journal.JournalRedisBackend(url))
    except Exception as error:  # SQLAlchemy, each driver and each backend have errors of their own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"storage is {shown_url(url)!r}: it cannot be reached ({without_secrets(text)}); give a URL like "
            "sqlite:///study.db or postgresql://USER@HOST/DB"
        ) from error


def _database(url: str, heartbeat_s: int) -> storages.RDBStorage:
    settings: dict[str, Any] = {}
    if url.startswith("sqlite"):
        settings = {"connect_args": {"timeout": BUSY_S}}
    elif url.startswith("postgresql"):
        settings = {"connect_args": {"connect_timeout": CONNECT_S}, "pool_pre_ping": True}
    return storages.RDBStorage(
        url.replace("postgresql://", "postgresql+psycopg://", 1),  # the driver that the extra `postgres` brings
        engine_kwargs=settings,
        heartbeat_interval=heartbeat_s,
        grace_period=MISSED * heartbeat_s,
        heartbeat_stale_trial_callback=try_again,
    )


def has_heartbeat(url: str) -> bool:
    """Whether the storage at a URL notices that a worker was killed."""
    return not url.startswith(("journal:", "redis://", "rediss://", "grpc://"))


def shown_url(url: str) -> str:
    """A URL without its password."""
    return without_address_secrets(url)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its lines for every trial, and without its warnings about what is experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def try_again(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Put a trial whose worker was killed, or interrupted, back in the queue, with its parameters and nothing else.

    Optuna's own callback would also keep what successive halving has noted about the trial, which would then compete
    with itself, and the rollouts that the dead trial spent, which would then count twice.
    """
    bare = copy.deepcopy(trial)
    bare.user_attrs = {key: value for key, value in trial.user_attrs.items() if key == "origin"}
    bare.system_attrs = {key: value for key, value in bare.system_attrs.items() if not key.startswith(RUNGS)}
    with quiet_optuna():
        storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, bare)
