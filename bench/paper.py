"""The paper's order of pass-Q, to hold ringkern's against: all partial outputs return at the end.

paper.md, Algorithms 3 and 4: queries go round; after the loop one exchange (All2All) returns the
partial outputs, which are merged then. For decode the paper pads the queries to a multiple of the
ranks, so that messages are of equal size, and attends with all of them: its Table 8 counts as many
attention calls per step for a batch of 1 as for one of 4.
"""

from ringkern.schedule import OUTLINES

PAPER_PASS_Q = "paper_pass_q"
UNPADDED = "paper_pass_q_unpadded"  # kinder than the paper: a decode step's batch as it is


def paper_pass_q(view):
    """Return the steps in outline, as schedule.OUTLINES wants them.

    In the paper every rank's queries go all the way round, padded to equal numbers: here they do
    so too, as many as the plan has, so a message may be empty.
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


def padding(impl: str, batch: int, world_size: int) -> int:
    """Return how many sequences the method adds to a decode step's batch."""
    return -batch % world_size if impl == PAPER_PASS_Q else 0


OUTLINES[PAPER_PASS_Q] = OUTLINES[UNPADDED] = paper_pass_q


PEAK_FLOPS = 35e9  # of a rank at the largest shapes, 4 ranks on 2 cores: bench/results


def hides_kv(world_size: int, link_mbit: float, shape: dict[str, int], spare: float = 1.2) -> bool:
    """Return whether equation (2) holds with room to spare: K and V travel under attention.

    T >= N * C * N_KV * e / (2 * N_H * BW), for float32. It counts every query against every key; a
    causal mask leaves half of those among the new tokens, so that much more is needed.
    """
    new, cached = shape["new"], shape["cached"]
    link = 1e6 * link_mbit / 8
    least = world_size * PEAK_FLOPS * shape["nheads_k"] * 4 / (2 * shape["nheads"] * link)
    return new >= spare * least * (cached + new) / (cached + new / 2)
