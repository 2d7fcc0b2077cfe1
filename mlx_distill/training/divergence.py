"""When training has gone wrong with numbers that are all finite, as it does at too high a learning rate.

A step's loss alone proves nothing: the rows of one step may be harder than those of another by several nats a token.
So the mean over a window of steps raises no more than a suspicion, where it lies far above the lowest loss known: that
of the first step, which no update has touched, of the first validation, and of the windows before. The proof is a
comparison on the same rows: those of the last step, with the adapter as it is and with the one that is kept. Neither
rows nor dropout differ between the two, and training on rows lowers their loss, so no noise makes an adapter far worse
on them than one from before; and a spike that has passed by the window's end is not seen at all.

The comparison costs a forward pass or two, only on suspicion and at most once a window.
"""

from __future__ import annotations

#: Steps between two looks. Long enough that a run which is only thrown back for some steps has come back.
WINDOW = 20


def far_above(loss: float, reference: float) -> bool:
    """Whether a mean loss, in nats a token, is above twice a reference, and by more than a nat."""
    return loss > max(2 * reference, reference + 1)
