"""What is said at the end of a response's training: which copies are at no minimum, why, and what helps."""

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_ext.modules._influence_newton import Newton

_NAMED = 8  # copies in a message


def advise_on_the_end(who: str, ratio: Tensor, tolerance: float, newton: Newton | None) -> None:
    """Warn of copies whose relative gradient is above the tolerance."""
    above = (~(ratio <= tolerance)).nonzero().flatten().tolist()
    if not above:
        return
    held = [] if newton is None else newton.held.nonzero().flatten().tolist()
    advice = "train longer, with another lr, or with optimizer='newton'" if newton is None else "give more epochs"
    if held:
        advice += (
            f". Copies {held[:_NAMED]} were held at ten times the influence function's distance, where the objective "
            "still falls: it may have no minimum. Raise damping or remove less"
        )
    rank_zero_warn(
        f"{who} stopped at a relative gradient of {ratio.max().item():.2e}, above tolerance={tolerance:g} for "
        f"{len(above)} of {len(ratio)} copies, {above[:_NAMED]}: {advice}. Networks with kinks (ReLU) may have a "
        "minimum at one, where the gradient does not vanish."
    )


def advise_on_risen(risen: list[int]) -> None:
    """Warn of copies in which the removed samples' loss grew tenfold."""
    if risen:
        rank_zero_warn(
            f"The loss of the removed samples rose more than tenfold for copies {risen[:_NAMED]}: too much is removed "
            "for this damping, and the objective may have no minimum. Raise damping or remove less."
        )
