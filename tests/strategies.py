"""What the property tests draw from."""

from hypothesis import strategies as st

WORLD_SIZES = st.sampled_from([1, 2, 3, 5, 8])
LAYOUTS = st.sampled_from(["contiguous", "zigzag", "striped"])
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)
WINDOWS = st.one_of(st.just((-1, -1)), st.tuples(st.integers(-1, 12), st.integers(-1, 12)))
