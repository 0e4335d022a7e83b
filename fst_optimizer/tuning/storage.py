"""Where a study is stored, and what becomes of trials whose workers were killed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fst_optimizer.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

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
"""How Optuna's successive halving names what it keeps of a trial."""


def open_storage(url: str, heartbeat_s: int = HEARTBEAT_S) -> BaseStorage:
    """The storage at a URL.

    `sqlite:///FILE`, `postgresql://USER:PASSWORD@HOST/DB` and `mysql://...` have heartbeats: trials of killed workers
    are found and tried again. `journal:FILE`, `redis://HOST` and `grpc://HOST:PORT` have none.

    Raises:
        UserError: it cannot be reached; a password in the URL is not repeated.
    """
    from optuna import storages
    from optuna.storages import journal

    try:
        with quiet_optuna():
            if url.startswith("journal:"):
                return storages.JournalStorage(journal.JournalFileBackend(url.removeprefix("journal:")))
            if url.startswith(("redis://", "rediss://")):
                return storages.JournalStorage(journal.JournalRedisBackend(url))
            if url.startswith("grpc://"):
                host, _, port = url.removeprefix("grpc://").rpartition(":")
                return storages.GrpcStorageProxy(host=host, port=int(port))
            return storages.RDBStorage(
                _with_driver(url),
                engine_kwargs=_engine_settings(url),
                heartbeat_interval=heartbeat_s,
                grace_period=MISSED * heartbeat_s,
                heartbeat_stale_trial_callback=try_again,
            )
    except Exception as error:  # SQLAlchemy, each driver and each backend have errors of their own
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        password = _password(url)
        if password:
            text = text.replace(password, "***")
        raise UserError(
            f"storage is {shown_url(url)!r}: it cannot be reached ({text}); give a URL like sqlite:///study.db or "
            "postgresql://USER@HOST/DB"
        ) from error


def shown_url(url: str) -> str:
    """A URL without its password."""
    password = _password(url)
    return url.replace(f":{password}@", ":***@") if password else url


def _password(url: str) -> str:
    _, _, rest = url.partition("://")
    user, at, _ = rest.rpartition("@")
    return user.partition(":")[2] if at else ""


def _with_driver(url: str) -> str:
    """psycopg, the driver that the extra `postgres` brings, unless the URL names one."""
    return url.replace("postgresql://", "postgresql+psycopg://", 1)


def _engine_settings(url: str) -> dict[str, Any]:
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": BUSY_S}}
    if url.startswith("postgresql"):
        return {"connect_args": {"connect_timeout": CONNECT_S}, "pool_pre_ping": True}
    return {}


def has_heartbeat(study: Study) -> bool:
    """Whether a killed worker is noticed."""
    from optuna.storages._heartbeat import is_heartbeat_enabled

    return is_heartbeat_enabled(study._storage)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna without its lines for every trial, and without its warnings about what is experimental."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def try_again(study: Study, trial: FrozenTrial) -> None:
    """Put a trial whose worker was killed, or interrupted, back in the queue, with its parameters and nothing else.

    Optuna's own callback also keeps what successive halving has noted about the trial, which would then compete with
    itself.
    """
    import optuna

    history = [*trial.system_attrs.get("retry_history", []), trial.number]
    if len(history) > RETRIES:
        return
    kept = {key: value for key, value in trial.system_attrs.items() if not key.startswith(RUNGS)}
    study.add_trial(
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={key: value for key, value in trial.user_attrs.items() if key == "origin"},
            system_attrs={**kept, "failed_trial": history[0], "retry_history": history},
        )
    )
