"""Whether a campaign may spread a user's own layer over as many ranks as it is asked to."""

from __future__ import annotations

from collections.abc import Sequence

from attn_fuzz.backends import registry
from attn_fuzz.backends.kernel import BackendUnavailable
from attn_fuzz.backends.user import InsideLayer
from attn_fuzz.backends.user_rank_layer import takes


def require_ranks(name: str, ranks: Sequence[int], tensor_ranks: Sequence[int]) -> None:
    """Sees that a user's layer takes all of these numbers of ranks; of other backends nothing is asked.

    Raises:
        BackendUnavailable: where it does not declare it, with what it should declare in one sentence.
    """
    kernel = registry.load(name).kernel
    if not isinstance(kernel, InsideLayer):
        return
    stated = kernel.capabilities
    for key, what, taken, asked in (
        ("ranks", "ranks", stated.ranks, ranks),
        ("tensor_ranks", "tensor ranks", stated.tensor_ranks, tensor_ranks),
    ):
        if (missing := [number for number in asked if not takes(taken, number)]) and taken is False:
            raise BackendUnavailable(
                f"{kernel.name} does not declare that it goes over {what}: a class with capabilities = "
                f'{{"{key}": True}} is handed its process group (docs/your_layer.md)'
            )
        if missing:
            assert isinstance(taken, tuple)
            numbers, option = ", ".join(map(str, taken)), f"--{key.replace('_', '-')}"
            raise BackendUnavailable(f"{kernel.name} takes {numbers} {what}, not {missing[0]}; choose with {option}")
