"""Which rank is to blame, from what ranks report of themselves and from seconds; knows no threads and no processes."""

from typing import NamedTuple

EVERY_S = 1.0  # between signs
DONE = "done"


class Sign(NamedTuple):
    """What a rank reports of itself to the others."""

    beat: int  # grows with every sign
    progress: int  # grows with every note of the training thread
    idle: float  # seconds since it last grew
    step: int
    phase: str
    vote: str  # the last of callbacks.support.collectives
    host: str
    pid: int
    birth: str  # tells the process from others that get its id later
    ended: str = ""  # "done", or the exception with which this rank has left fit

    def who(self, rank: int) -> str:
        return f"rank {rank} (host {self.host}, pid {self.pid})"

    def where(self) -> str:
        return f"step {self.step}, {self.phase} (last vote: {self.vote})"


class Verdict(NamedTuple):
    """Who is to blame, and what is to be said of it."""

    message: str
    silent: list[int]
    store: bool = False  # whether the store does not answer either


class Judge:
    """Decides from signs and seconds; knows nothing of threads and processes."""

    def __init__(self, rank: int, world_size: int, timeout_s: float, stalled_s: float, host: int | None = 0) -> None:
        self.rank, self.timeout_s, self.stalled_s = rank, timeout_s, stalled_s
        self.host = host  # rank whose process is the store; None: a process apart
        self.signs: list[Sign | None] = [None] * world_size
        self.silent = [0.0] * world_size  # seconds
        self.store_silent = 0.0
        self._rounds = 0

    def hear(self, signs: list[Sign | None], rounds: int, seconds: float) -> None:
        """The newest signs, how often the store has answered so far, and how much time went by since the last call."""
        self.store_silent = 0.0 if rounds != self._rounds else self.store_silent + seconds
        self._rounds = rounds
        for rank, (old, new) in enumerate(zip(self.signs, signs, strict=True)):
            same = new is None or (old is not None and new.beat == old.beat)
            self.silent[rank] = self.silent[rank] + seconds if same else 0.0
        self.signs = list(signs)

    def verdict(self, lost_connection: bool = False) -> Verdict | None:
        """None while all is well. `lost_connection`: a rank that has left with an exception explains it at once."""
        mine = self.signs[self.rank]
        if mine is None:
            return None
        others = [(rank, sign) for rank, sign in enumerate(self.signs) if rank != self.rank and sign is not None]
        failed = [(rank, sign) for rank, sign in others if sign.ended not in ("", DONE)]
        late = [(rank, sign) for rank, sign in failed if lost_connection or self.silent[rank] >= self.timeout_s]
        if late:
            found = "; ".join(f"{s.who(rank)} has left the run at {s.where()}: {s.ended}" for rank, s in late)
            return self._found(found, mine, [], "the cause is there")
        gone = [(r, s) for r, s in others if not s.ended and self.silent[r] >= self.timeout_s]
        store = self.store_silent >= self.timeout_s
        if store:  # then nobody can be heard; who was silent before that is to blame, else who keeps the store
            before = [(r, s) for r, s in gone if self.silent[r] > self.store_silent + 3 * EVERY_S]
            gone = before or [(r, s) for r, s in gone if r == self.host]
            if not gone and self.host is not None:
                return None  # it has done its work and left
            if not gone:
                return self._found("the store of the process group does not answer", mine, [], "", store=True)
        if gone:
            found = "; ".join(
                f"{s.who(rank)} has been silent for {self.silent[rank]:.0f} s, its last sign came from {s.where()}"
                for rank, s in gone
            )
            remedy = "its process was stopped or killed, or its machine is lost: look there (dmesg)"
            return self._found(found, mine, [rank for rank, _ in gone], remedy, store)
        if others and all(sign.idle >= self.stalled_s and not sign.ended for _, sign in [*others, (self.rank, mine)]):
            return self._stalled(mine, others)
        return None

    def _stalled(self, mine: Sign, others: list[tuple[int, Sign]]) -> Verdict:
        everyone = sorted([*others, (self.rank, mine)], key=lambda pair: pair[0])
        least, most = (f(sign.progress for _, sign in everyone) for f in (min, max))
        last = [(rank, sign) for rank, sign in everyone if sign.progress == least < most]
        found = "; ".join(f"{sign.who(rank)} lags, at {sign.where()}" for rank, sign in last) or "all are at one place"
        return self._found(
            f"no rank has got any further for {self.stalled_s:.0f} s: {found}", mine, [],
            "a deadlock, or stalled_s of hang_watch is too short for this run",
        )  # fmt: skip

    def _found(self, found: str, mine: Sign, silent: list[int], remedy: str, store: bool = False) -> Verdict:
        waits = f"{mine.who(self.rank)} waits at {mine.where()}"
        steps = "; ".join(x for x in (remedy, "then resume the last checkpoint") if x)
        return Verdict(f"{found}. {waits}. Remedy: {steps}", silent, store)
