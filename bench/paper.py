"""The paper's order of pass-Q, to hold ringkern's against: all partial outputs return at the end.

paper.md, Algorithms 3 and 4: queries go round; after the loop one exchange (All2All) returns the
partial outputs, which are merged then.
"""

from ringkern.schedule import OUTLINES

PAPER_PASS_Q = "paper_pass_q"


def paper_pass_q(view):
    """Return the steps in outline, as schedule.OUTLINES wants them.

    In the paper every rank's queries go all the way round, padded to equal numbers: here they do
    so too, without the padding, so a message may be empty.
    """
    size, rank, others = view.size, view.rank, view.others()
    steps = []
    for index in range(size):
        here, coming = (rank - index) % size, (rank - index - 1) % size
        last = index == size - 1
        sends = [] if last else [view.q((rank + 1) % size, here)]
        recvs = [] if last else [view.q((rank - 1) % size, coming)]
        steps.append((sends, recvs, view.work(here, rank)))
    back = [view.part(peer, peer) for peer in others if view.sees[peer, rank]]
    mine = [view.part(peer, rank) for peer in others if view.sees[rank, peer]]
    steps.append((back, mine, ()))
    return steps


OUTLINES[PAPER_PASS_Q] = paper_pass_q
