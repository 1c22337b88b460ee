"""Launches of kernels that are made ready once: for a layer, which is like the one before."""

from ringkern.kernels.target import triton


class Launch:
    """A kernel on a grid with all its arguments but tensors.

    Triton looks at every argument whenever a kernel is launched, which takes the host 40 us for the
    60 of a ring step. So the first call leaves that to Triton, and keeps the kernel that it found;
    the others hand it addresses.

    Args:
        kernel: a jitted function whose first arguments are the tensors.
        grid: of up to three dimensions.
        numbers: the arguments after the tensors, but for constexprs.
        constexprs: by name.
        options: what Triton takes beside: num_warps, num_stages, maxnreg.
    """

    def __init__(self, kernel, grid: tuple[int, ...], numbers, constexprs: dict, **options):
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._constexprs, self._options = constexprs, options
        self._run = None

    @property
    def ready(self) -> bool:
        """Whether calls take of tensors their addresses alone, whatever dtypes they say."""
        return self._run is not None

    def __call__(self, *tensors) -> None:
        """Launch on the current stream of the current device, which is the tensors'.

        Args:
            tensors: in each call None where they were None, with the same strides and dtypes, and
                with addresses that leave the same remainder by 16: what Triton compiles for.
        """
        if self._run:
            self._run(*[None if x is None else x.data_ptr() for x in tensors], *self._numbers)
            return
        options = self._constexprs | self._options
        compiled = self._kernel[self._grid](*tensors, *self._numbers, **options)
        if isinstance(compiled, triton.compiler.CompiledKernel):  # the interpreter has none
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._numbers = *self._numbers, *(self._constexprs[name] for name in names)
            self._run = compiled[(*self._grid, 1, 1)[:3]]
