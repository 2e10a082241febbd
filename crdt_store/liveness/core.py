r"""Who is there? SWIM's probing with Lifeguard's suspicion, without I/O.

    each period:  next member in a shuffled round --Ping--> silent
                  k others --Ping(target)--> silent too, or a period is over
                      -> suspect, and everybody hears of it with the next messages
    suspect:      answers anybody, or refutes with a higher incarnation -> alive
                  each who suspects it asks it itself, the oftener the more is lost
                  or its time runs out -> dead; dead ones are still tried, seldom

Slow is not dead: a suspicion lasts several periods; everything waits longer while *we*
are slow (the awareness of Lifeguard grows with each probe that fails and each answer
that is missing); and when we were not running ourselves nobody is judged by that time.

Sources: Das, Gupta, Motivala 2002, SWIM; Dadgar, Phillips, Currey 2018, Lifeguard
(arXiv:1707.00788).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from random import Random

from crdt_store.liveness.accord import Accord
from crdt_store.liveness.beliefs import MAX_JUMP, Beliefs, State, Verify
from crdt_store.liveness.calls import Call, Probe
from crdt_store.liveness.config import LivenessConfig
from crdt_store.liveness.loads import Loads
from crdt_store.liveness.messages import (
    MAX_INCARNATION,
    NOBODY,
    Ack,
    Claim,
    Load,
    Ping,
    Standing,
)
from fabric.core.ids import PeerId

__all__ = ["Call", "State", "Swim"]

MAX_AWARENESS = 8
"""S of Lifeguard: our own slowness stretches our times by up to this factor + 1."""
MAX_HINTED = 4
"""Extra probes per period, for peers whose connection broke."""
PUSH_TO = 2
"""Members told at once of an answered suspicion; they tell others the same way."""
MAX_PUSHED = 3
"""Such pushes per period."""
MAX_RELAYING = 16
"""Probes for others at once; more are answered "did not reach it"."""
DEAD_EVERY = 6
"""Periods between tries of somebody dead."""
STALL_SECONDS = 1.0
"""A deadline noticed this late says that we did not run, not that others are silent."""


class Swim:
    """One peer's view of who is there.

    Args:
        me: This peer.
        config: Periods.
        rng: Order of probes, choice of relays, phase.
        incarnation: Greater than in any earlier run of this peer.
        sign: Signs that we live in an incarnation.
        verify: Whether a member signed that it lives in one.
        now: Monotonic seconds.

    Attributes:
        load: Ours, sent with every message.
        loads: Those of others.
        incarnation: Ours.
        counts: Refused claims and bounds met, by name.
    """

    def __init__(
        self,
        me: PeerId,
        config: LivenessConfig,
        rng: Random,
        *,
        incarnation: int,
        sign: Callable[[int], bytes],
        verify: Verify,
        now: float,
    ) -> None:
        self.me = me
        self.incarnation = incarnation
        self.load = Load()
        self.loads = Loads()
        self._config = config
        self._rng = rng
        self._sign = sign
        self._beliefs = Beliefs(me, config, rng, verify)
        self._rounds = self._beliefs.rounds
        self._hinted = self._beliefs.hinted
        self._accord = Accord(self._beliefs, rng)
        self._probes: dict[PeerId, Probe] = {}
        self._out: list[Call] = []
        self._awareness = 0
        self._relaying = 0
        self._extra, self._pushes = MAX_HINTED, MAX_PUSHED
        self._periods = 0
        self._introduced = False
        self._refuted_at = -math.inf
        self._next_period = now + rng.random() * config.period_seconds
        self._announce()

    # --- what others may read

    def state(self, peer: PeerId) -> State:
        """Return what we believe of ``peer``; ourselves are alive."""
        return self._beliefs.state(peer)

    @property
    def dead(self) -> frozenset[PeerId]:
        """The members that are ghosts."""
        return frozenset(self._beliefs.dead)

    @property
    def counts(self) -> Counter[str]:
        """Refused claims and bounds met, by name."""
        return self._beliefs.counts

    @property
    def awareness(self) -> int:
        """How slow we are ourselves, 0 to MAX_AWARENESS."""
        return self._awareness

    @property
    def num_members(self) -> int:
        """Members that are not dead, ourselves included."""
        return self._beliefs.num_members

    def heard_at(self, peer: PeerId) -> float | None:
        """Return when ``peer`` itself said something last, if not long ago."""
        return self._beliefs.heard_at(peer)

    def take_changes(self) -> set[PeerId]:
        """Return and forget whose state changed since the last call."""
        return self._beliefs.take_changes()

    # --- facts from outside

    def set_members(self, members: Iterable[PeerId]) -> None:
        """Watch exactly ``members`` (ourselves are left out)."""
        wanted = set(members) - {self.me}
        for peer in self._rounds.members - wanted:
            self._beliefs.forget(peer)
            self.loads.forget(peer)
            self._accord.forget(peer)
            self._probes.pop(peer, None)
        for peer in sorted(wanted - self._rounds.members):
            self._beliefs.add(peer)

    def set_neighbours(self, peers: Collection[PeerId] | None) -> None:
        """Probe these members only, and hear of others; None: probe all."""
        self._accord.set_neighbours(peers)

    def connected(self, peer: PeerId, now: float) -> None:
        """``peer`` opened a connection with us, or accepted ours: it lives."""
        if peer in self._rounds:
            self._beliefs.witness(peer, None, now)

    def broke(self, peer: PeerId) -> None:
        """Our connection with ``peer`` broke: look soon whether it still lives."""
        if peer in self._rounds and peer not in self._beliefs.dead:
            self._hinted[peer] = None

    # --- time

    def next_timeout(self) -> float:
        """Return when :meth:`poll` is due at the latest."""
        due = min(self._next_period, self._beliefs.suspicions.next_timeout())
        for probe in self._probes.values():
            if probe.ends < due:
                due = probe.ends
        return due

    @property
    def has_more(self) -> bool:
        """Whether :meth:`poll` has something to do before :meth:`next_timeout`."""
        return bool(self._out or self._hinted or self._beliefs.urgent)

    def poll(self, now: float) -> list[Call]:
        """Do what is due and return the calls to start now.

        Also due after every other input.
        """
        late = now - self.next_timeout()
        if late > STALL_SECONDS:
            self._beliefs.suspicions.postpone(late)
            self._probes.clear()
            self._be_aware(+1)
        if now >= self._beliefs.suspicions.next_timeout():
            self._end_suspicions(now)
        for peer in [p for p, probe in self._probes.items() if now >= probe.ends]:
            self._be_aware(+1)  # not even a relay's "no" came in time
            self._conclude(peer, now)
        if now >= self._next_period:
            self._begin_period(now)
        self._use_extras(now)
        calls, self._out = self._out, []
        return calls

    def _end_suspicions(self, now: float) -> None:
        patience = self._stretched(self._config.probe_seconds)
        for peer, until in self._beliefs.to_ask(now, patience):
            self._tell(peer, now, until - now)
        for peer in self._beliefs.bury_due(now):
            self._probes.pop(peer, None)
            self.loads.forget(peer)

    def _be_aware(self, change: int) -> None:
        self._awareness = min(max(self._awareness + change, 0), MAX_AWARENESS)

    def _stretched(self, seconds: float) -> float:
        return seconds * (1 + self._awareness)

    def _begin_period(self, now: float) -> None:
        self._next_period = now + self._stretched(self._config.period_seconds)
        self._extra, self._pushes = MAX_HINTED, MAX_PUSHED
        self._periods += 1
        dead = self._beliefs.dead
        target = self._accord.near.next(dead)
        if target is not None:
            self._probe(target, now)
        for peer in self._accord.take_disputed(MAX_HINTED):
            self._tell(peer, now, self._config.probe_seconds)
        if dead and self._periods % DEAD_EVERY == 0:
            self._tell(self._rng.choice(sorted(dead)), now, self._config.probe_seconds)

    def _use_extras(self, now: float) -> None:
        while self._hinted and self._extra:
            self._extra -= 1
            peer = next(iter(self._hinted))
            del self._hinted[peer]
            self._probe(peer, now)
        if self._beliefs.urgent and self._pushes:
            self._pushes -= 1
            self._beliefs.urgent = False
            for peer in self._accord.near.sample(PUSH_TO, self._beliefs.dead):
                self._tell(peer, now, self._config.probe_seconds)

    # --- probes

    def _probe(self, target: PeerId, now: float) -> None:
        if target in self._probes or target in self._beliefs.dead:
            return
        ends = now + self._stretched(self._config.period_seconds)
        self._probes[target] = Probe(ends)
        deadline = now + self._stretched(self._config.probe_seconds)
        self._out.append(Call(target, self._ping(target, now), deadline, target))

    def _tell(self, peer: PeerId, now: float, seconds: float) -> None:
        """Say what we have to say to ``peer``; its answer is a sign of life."""
        self._out.append(Call(peer, self._ping(peer, now), now + seconds))

    def _ping(self, peer: PeerId, now: float, target: PeerId = NOBODY) -> Ping:
        return Ping(
            self.incarnation,
            self._beliefs.take_news(peer),
            self.load,
            self.loads.reports(now),
            target,
            intro=not target and (not self._introduced or self._accord.wants_list(now)),
            absences=self._accord.mark(),
        )

    def answered(self, call: Call, ack: Ack, now: float) -> None:
        """``call.peer`` answered ``call``."""
        self._hear(call.peer, ack, now)
        self._beliefs.losses.answered()
        if call.ping.intro:
            self._introduced = True
            self._accord.hear_list(ack.claims)
        probe = self._probes.get(call.about)
        if not call.ping.target or ack.reached:
            self._probes.pop(call.about, None)
            self._be_aware(-1)
        elif probe is not None:
            self._one_less(call.about, probe, now)

    def failed(self, call: Call, now: float) -> None:
        """``call`` brought no answer by its deadline, or was refused."""
        stalled = now - call.deadline > STALL_SECONDS  # we could not hear an answer
        if not stalled and not call.ping.target:
            self._beliefs.unanswered(call.peer)
        probe = self._probes.get(call.about)
        if probe is None:
            return
        if stalled:
            del self._probes[call.about]
            self._be_aware(+1)
        elif now >= probe.ends:
            return  # the next poll judges
        elif not probe.relayed:
            self._probe_through_others(call.about, probe, now)
        else:
            self._be_aware(+1)  # a relay says yes or no in time, unless we are slow
            self._one_less(call.about, probe, now)

    def _probe_through_others(self, target: PeerId, probe: Probe, now: float) -> None:
        away = {target, *self._beliefs.dead, *self._beliefs.suspicions}
        relays = self._accord.near.sample(self._config.num_relays, away)
        probe.relayed, probe.waiting = True, len(relays)
        for relay in relays:
            ping = self._ping(relay, now, target)
            self._out.append(Call(relay, ping, probe.ends, target))
        if not relays:
            self._be_aware(+1)
            self._conclude(target, now)

    def _one_less(self, target: PeerId, probe: Probe, now: float) -> None:
        probe.waiting -= 1
        if probe.waiting <= 0:
            self._conclude(target, now)

    def _conclude(self, target: PeerId, now: float) -> None:
        """Nobody reached ``target``: suspect it, and leave word of that with it.

        If it only stalls, it finds the message when it runs again, and answers.
        """
        del self._probes[target]
        self._beliefs.suspect(target, now)
        patience = self._config.shortest_suspicion(self.num_members)
        self._tell(target, now, patience)

    # --- answering

    def receive(self, sender: PeerId, ping: Ping, now: float) -> Ack | Call:
        """Return the answer to ``ping``, or a call that comes before it.

        After that call give its result to :meth:`relayed`.
        """
        self._hear(sender, ping, now)
        if not ping.target:
            return self._ack(sender, now, intro=ping.intro)
        if ping.target not in self._rounds or self._relaying >= MAX_RELAYING:
            self.counts["relay_refused"] += 1
            return self._ack(sender, now, reached=False)
        self._relaying += 1
        news = self._beliefs.take_news(ping.target)
        deadline = now + self._config.probe_seconds
        return Call(ping.target, Ping(self.incarnation, news, self.load), deadline)

    def relayed(self, sender: PeerId, call: Call, ack: Ack | None, now: float) -> Ack:
        """Return the answer to ``sender``, for whom we made ``call``."""
        self._relaying -= 1
        if ack is not None:
            self._hear(call.peer, ack, now)
        return self._ack(sender, now, reached=ack is not None)

    def _ack(
        self, peer: PeerId, now: float, *, reached: bool = True, intro: bool = False
    ) -> Ack:
        beliefs = self._beliefs
        claims = beliefs.introduction() if intro else beliefs.take_news(peer)
        reports = self.loads.reports(now)
        mark = self._accord.mark()
        return Ack(self.incarnation, claims, self.load, reports, reached, mark)

    def _hear(self, sender: PeerId, message: Ping | Ack, now: float) -> None:
        members, beliefs = self._rounds.members, self._beliefs
        if sender not in members:
            return  # a stranger, or a member we have not heard of: no news from it
        beliefs.witness(sender, message.incarnation, now)
        self._accord.compare(message.absences)
        self.loads.hear(sender, message.load, now, met=True)
        self.loads.hear_reports(message.reports, sender, members, now)
        for claim in message.claims:
            if claim.subject == self.me:
                self._refute(claim, now)
            else:
                beliefs.hear_claim(claim, now)

    # --- ourselves

    def _refute(self, claim: Claim, now: float) -> None:
        """Somebody says that we are not there: outbid it."""
        if claim.standing is Standing.ALIVE or claim.incarnation < self.incarnation:
            return
        far = claim.incarnation - self.incarnation
        if far > MAX_JUMP or claim.incarnation >= MAX_INCARNATION:
            self.counts["claim_too_far"] += 1
        elif now - self._refuted_at >= STALL_SECONDS:  # a liar sets no pace
            self._refuted_at = now
            self.incarnation = claim.incarnation + 1
            self._be_aware(+1)
            self._announce()
            self._beliefs.urgent = True

    def _announce(self) -> None:
        signature = self._sign(self.incarnation)
        self._beliefs.news.add(
            Claim(self.me, self.incarnation, Standing.ALIVE, self.me, signature)
        )
