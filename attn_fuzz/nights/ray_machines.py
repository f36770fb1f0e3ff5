"""Machines of a Ray cluster: an actor at each place, with one GPU, or with cores only."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from typing import Any, Final

from attn_fuzz.nights.machines import ClusterError, Lost, Place
from attn_fuzz.nights.node import Node

_MISSING: Final = "Ray is not installed here; --ray needs it: pip install 'attn-fuzz[ray]', here and on each machine"


def places_of(nodes: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[Place]:
    """What machines have room for: each GPU is a place, and so are the cores, which all of these share.

    Args:
        nodes: as ``ray.nodes()`` tells of them.
        kinds: of devices that are asked for.
    """
    found: list[Place] = []
    for node in nodes:
        has = node["Resources"]
        gpus, cores = (int(has.get(name, 0)) for name in ("GPU", "CPU"))
        wanted = [*["cuda"] * gpus * ("cuda" in kinds), *["cpu"] * ("cpu" in kinds and cores > 0)]
        if node["Alive"]:
            found += [
                Place(node["NodeID"], node["NodeManagerHostname"], kind, number, cores // len(wanted))
                for number, kind in enumerate(wanted)
            ]
    return found


class RayMachines:
    """Those of a cluster.

    Args:
        address: of its head, ``auto`` for that of this machine.
        kinds: of devices that are asked for, ``cpu`` and ``cuda``.

    Raises:
        ClusterError: when there is no such cluster, or none of its machines has such a device.
    """

    def __init__(self, address: str, kinds: Sequence[str]) -> None:
        try:
            import ray
        except ImportError:
            raise ClusterError(_MISSING) from None
        self._ray, self._kinds = ray, tuple(kinds)
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise ClusterError(f"there is no Ray cluster at {address} that can be joined: {said}") from None
        finally:
            # Ray has one that ends this process without a word.
            signal.signal(signal.SIGTERM, before)
        if not self.places():
            self.close()
            raise ClusterError(f"no machine of the Ray cluster at {address} has {' or '.join(kinds)}")

    def places(self) -> Sequence[Place]:
        """Those that are there now."""
        return places_of(self._ray.nodes(), self._kinds)

    def start(self, place: Place, name: str) -> Any:
        """An actor at a place; it waits there until GPU and cores are free."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        options = {
            "num_cpus": place.cores,
            "num_gpus": int(place.kind == "cuda"),
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.machine, soft=False),
        }
        return self._ray.remote(Node).options(**options).remote(name)

    def ask(self, node: Any, method: str, *arguments: Any) -> Any:
        """What a method of an actor will have given."""
        return getattr(node, method).remote(*arguments)

    def answered(self, answers: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those that are there, after at most so many seconds."""
        found, _ = self._ray.wait([*answers], num_returns=1, timeout=seconds)
        return list(found)

    def value(self, answer: Any) -> Any:
        """What came.

        Raises:
            Lost: when nothing will ever come.
        """
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            # What a method raised, or that machine or process are no more.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raised = isinstance(error, self._ray.exceptions.RayTaskError)
            # The first sentence; what follows is about Ray.
            raise Lost(lines[-1 if raised else 0].strip().partition(". ")[0].rstrip(".")) from None

    def stop(self, node: Any) -> None:
        """Ends an actor's process; the campaign that it started ends with it."""
        self._ray.kill(node)

    def close(self) -> None:
        """Ends all of them."""
        self._ray.shutdown()
