"""Modules that hold packed weights and run the ops."""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import OpError
from . import dispatch
from .cache import Derived
from .dense_linear import WIDENED, widened_linear
from .depthwise_conv import depthwise_conv
from .separable_conv import Depthwise, Pointwise, separable_conv
from .sparse_conv1x1 import activated, sparse_conv1x1
from .sparse_conv2d import sizes_after, sparse_conv2d
from .sparse_linear import case, sparse_linear
from .weights import SparseWeight, pack


class SparseLinear(nn.Module):
    """A linear layer that stores and multiplies its kept weights only.

    It trains: `values` is a parameter, and its zeros are not there to be lost. The state dict holds
    `values`, `index`, `pointer` and `bias`; a corrupt index is refused at the next call.
    """

    values: nn.Parameter
    index: Tensor
    pointer: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: SparseWeight, bias: Float[Tensor, " out"] | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.layout, self.width = weight.layout, weight.width
        self.values = nn.Parameter(weight.values)
        self.register_buffer("index", weight.index)
        self.register_buffer("pointer", weight.pointer)
        self._weight: SparseWeight | None = None  # the last one returned, with what it remembers
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, mask: Bool[Tensor, "out in"] | None = None, layout: str = "auto"
    ) -> SparseLinear:
        """Pack a dense layer.

        Args:
            mask: True where kept; the non-zero weights by default.
            layout: as in `zoo.shared.ops.weights.pack`.

        Raises:
            OpError: a layer that is not a plain nn.Linear, or what `pack` refuses.
        """
        if type(linear) is not nn.Linear:
            raise OpError(
                f"{type(linear).__name__} is not a plain nn.Linear: its forward may do more than a product"
            )
        module = cls(pack(linear.weight, mask, layout), linear.bias)
        module.values.requires_grad_(linear.weight.requires_grad)
        return module.train(linear.training)

    @property
    def weight(self) -> SparseWeight:
        """The packed weight; shares the parameter and the buffers."""
        # Not through nn.Module's look-up of attributes, which takes as long as a small product.
        held, buffers = self._weight, self._buffers
        values, index, pointer = self._parameters["values"], buffers["index"], buffers["pointer"]
        if held is not None and held.values is values and held.index is index and held.pointer is pointer:
            return held
        shape = (self.out_features, self.in_features)
        weight = SparseWeight(self.values, self.index, self.pointer, self.layout, shape, self.width)
        if not torch.compiler.is_compiling():
            self._weight = weight
        return weight

    def to_dense(self) -> nn.Linear:
        """A plain nn.Linear of the same weights."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.values.device, self.values.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight.to_dense())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return sparse_linear(x, self.weight, self._parameters["bias"])  # see `weight`

    def extra_repr(self) -> str:
        sizes = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"{sizes}, layout={self.layout}, density={self.weight.density:.3f}"


# Looked up once, as the look-ups would take as long as the answers.
_requested, _threads, _autocast = dispatch.requested, torch.get_num_threads, torch._C._is_any_autocast_enabled
_linear = nn.functional.linear


class WideningLinear(nn.Linear):
    """A linear layer that multiplies halves by way of fp32 on a processor that does not multiply halves
    (`dense_linear.widened_linear`); the state dict is that of `nn.Linear`."""

    def __init__(self, linear: nn.Linear) -> None:
        """Share the parameters of a plain layer.

        Raises:
            OpError: a layer that is not a plain nn.Linear.
        """
        if type(linear) is not nn.Linear:
            raise OpError(f"{type(linear).__name__} is not a plain nn.Linear: its forward may do more")
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self._many = self._MANY * self.in_features

    _MANY = WIDENED  # rows of x from which `_forward_many` may find a faster way
    _many: int

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if x.numel() >= self._many and not _autocast() and x.shape[-1] == self.in_features:
            return self._forward_many(x)
        # Not through nn.Module's look-up of attributes, see `SparseLinear.weight`.
        parameters = self._parameters
        row = x.numel() == self.in_features == x.shape[-1] and x.dtype is not torch.float32
        product = widened_linear if row else _linear
        return product(x, cast(Tensor, parameters["weight"]), parameters["bias"])

    def _forward_many(self, x: Tensor) -> Tensor:
        return widened_linear(x, self.weight, self.bias)


_packed = Derived[SparseWeight](1024)


class LinearByRows(WideningLinear):
    """A linear layer, its weight dense with zeros, that multiplies the kept weights only where x has so many
    rows that this is faster, and is a plain layer otherwise: a product of one row is over before the zeros
    are found.

    What was measured for the number of threads decides. The packed weight is made when it is first used, and
    again when the content of `weight` has changed; the state dict is that of `nn.Linear`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._faster: dict[tuple[int, torch.dtype, int], bool] = {}

    def faster(self, rows: int, dtype: torch.dtype = torch.float32) -> bool:
        """Whether so many rows, to the power of two below, are expected to be multiplied faster by the kept
        weights, the time to see that these are still the same included."""
        power = max(1, rows).bit_length() - 1
        choice = (_threads(), dtype, power)
        if choice not in self._faster:
            self._faster[choice] = self._expect(1 << power, dtype)
        return self._faster[choice]

    def _expect(self, rows: int, dtype: torch.dtype) -> bool:
        weight = self.packed
        offered, kind, sizes, _ = case(weight.values.new_empty(rows, self.in_features, dtype=dtype), weight)
        plain, looked = (
            dispatch.choose("sparse_linear", self.weight.device, offered, kind, sizes, copied)
            for copied in (0, self.weight.nbytes)
        )
        if plain.backend in ("dense", "reference") or "dense" not in plain.measured:
            return False
        looking = looked.measured["dense"] - plain.measured["dense"]
        return plain.measured[plain.backend] + looking <= dispatch.MARGIN * plain.measured["dense"]

    @property
    def packed(self) -> SparseWeight:
        """The packed weight of the present content of `weight`."""
        return _packed.get((self.weight,), lambda: pack(self.weight))

    _MANY = 2

    def _forward_many(self, x: Tensor) -> Tensor:
        return sparse_linear(x, self.packed, self.bias) if self._skips(x) else super()._forward_many(x)

    def _skips(self, x: Tensor) -> bool:
        weight = self.weight
        if torch.compiler.is_compiling() or not dispatch.direct(x, weight, self.bias):
            return False
        if x.dtype is not weight.dtype or x.device != weight.device:
            return False
        request = _requested()
        if request != "auto":
            return request != "dense"
        return self.faster(x.numel() // self.in_features, x.dtype)


class SparseConv1x1(SparseLinear):
    """A 1x1 convolution with stride 1 that stores and multiplies its kept weights only, see
    `SparseLinear`."""

    @classmethod
    def from_convolution(
        cls, convolution: nn.Conv2d, mask: Bool[Tensor, "out in 1 1"] | None = None, layout: str = "auto"
    ) -> SparseConv1x1:
        """Pack a dense 1x1 convolution; arguments as for `from_dense`.

        Raises:
            OpError: a kernel, stride, padding or number of groups other than 1, 1, 0 and 1.
        """
        if not is_pointwise(convolution):
            raise OpError(f"{convolution} is not a plain 1x1 convolution with stride 1 and one group")
        weight = convolution.weight.flatten(1)
        module = cls(pack(weight, None if mask is None else mask.flatten(1), layout), convolution.bias)
        module.values.requires_grad_(convolution.weight.requires_grad)
        return module.train(convolution.training)

    relu = 0
    """1 if it returns the positive part, 6 for that up to 6."""

    before: tuple[SparseConv1x1 | None, DepthwiseConv] | None = None
    """A 1x1 and a depthwise convolution, parts of another module, that x goes through first: all three run in
    one pass."""

    def forward(
        self, x: Float[Tensor, "batch in *map"], residual: Tensor | None = None
    ) -> Float[Tensor, "batch out *map"]:
        if self.before is not None:
            expand, between = self.before
            apart = torch.compiler.is_compiling() or between._forward_hooks or between._forward_pre_hooks
            if expand is not None:
                apart = apart or expand._forward_hooks or expand._forward_pre_hooks
            if not apart:
                first = None if expand is None else expand.pointwise
                return separable_conv(x, first, between.depthwise, self.pointwise, residual)
            x = between(x if expand is None else expand(x))
        if residual is not None and residual.shape != (x.shape[0], self.out_features, *x.shape[2:]):
            return activated(sparse_conv1x1(x, self.weight, self.bias) + residual, self.relu)
        return sparse_conv1x1(x, self.weight, self.bias, relu=self.relu, residual=residual)

    @property
    def pointwise(self) -> Pointwise:
        """Its weight, bias and activation, for `separable_conv`."""
        return Pointwise(self.weight, self._parameters["bias"], self.relu)


class SparseConv2d(SparseLinear):
    """A convolution of one group with equal kernel, stride and padding in both directions that stores and
    multiplies its kept weights only, see `SparseLinear`."""

    relu = 0
    """1 if it returns the positive part, 6 for that up to 6."""

    @classmethod
    def from_convolution(
        cls,
        convolution: nn.Conv2d,
        mask: Bool[Tensor, "out in size size"] | None = None,
        layout: str = "auto",
    ) -> SparseConv2d:
        """Pack a dense convolution; arguments as for `from_dense`.

        Raises:
            OpError: a convolution that `is_plain` refuses, or what `pack` refuses.
        """
        if not is_plain(convolution):
            raise OpError(f"{convolution} is not a plain convolution of one group with a square kernel")
        kept = None if mask is None else mask.flatten(1)
        module = cls(pack(convolution.weight.flatten(1), kept, layout), convolution.bias)
        module.kernel, module.stride = int(convolution.kernel_size[0]), int(convolution.stride[0])
        module.padding = int(convolution.padding[0])
        module.values.requires_grad_(convolution.weight.requires_grad)
        return module.train(convolution.training)

    kernel, stride, padding = 1, 1, 0

    def forward(
        self, x: Float[Tensor, "batch in height width"], residual: Tensor | None = None
    ) -> Float[Tensor, "batch out out_height out_width"]:
        form: dict[str, Any] = {"kernel": self.kernel, "stride": self.stride, "padding": self.padding}
        if residual is not None:
            size = sizes_after(x.shape[2], x.shape[3], **form)
            if residual.shape != (x.shape[0], self.out_features, *size):  # it is to be spread
                return activated(sparse_conv2d(x, self.weight, self.bias, **form) + residual, self.relu)
        return sparse_conv2d(x, self.weight, self.bias, **form, relu=self.relu, residual=residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kernel={self.kernel}, stride={self.stride}, padding={self.padding}"


class DepthwiseConv(nn.Module):
    """A depthwise convolution for the channel-major maps of `SparseConv1x1`; the state dict is that of the
    `nn.Conv2d` it was made from."""

    relu = 0
    """1 if it returns the positive part, 6 for that up to 6."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        """Raises OpError: a convolution that `is_depthwise` refuses."""
        super().__init__()
        if not is_depthwise(convolution):
            raise OpError(f"{convolution} is not a plain depthwise convolution with a square kernel")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.stride, self.padding = int(convolution.stride[0]), int(convolution.padding[0])

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        return depthwise_conv(
            x, self.weight, self.bias, stride=self.stride, padding=self.padding, relu=self.relu
        )

    @property
    def depthwise(self) -> Depthwise:
        """Its weight, bias and form, for `separable_conv`."""
        parameters = self._parameters
        weight = cast(Tensor, parameters["weight"])
        return Depthwise(weight, parameters["bias"], self.stride, self.padding, self.relu)

    def extra_repr(self) -> str:
        channels, _, size, _ = self.weight.shape
        return f"{channels}, kernel_size={size}, stride={self.stride}, padding={self.padding}"


class MaxPool(nn.MaxPool2d):
    """The same for channel-major maps: maxima of whole rows, then of columns. For windows of 3 x 3 they take
    a tenth to a sixth of torch's time on a CPU, a fifth to two fifths of that by way of channels-last maps.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__(
            pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices, pool.ceil_mode
        )

    def forward(self, x: Float[Tensor, "*batch height width"]) -> Any:
        kernel, stride, padding, dilation = (
            (each, each) if isinstance(each, int) else each
            for each in (self.kernel_size, self.stride, self.padding, self.dilation)
        )
        plain = x.dim() == 4 and x.is_contiguous() and x.is_floating_point() and x.numel() > 0
        wanted = dilation != (1, 1) or self.return_indices or (x.requires_grad and torch.is_grad_enabled())
        if not plain or wanted or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            return super().forward(x)  # also where it refuses
        for dim in (2, 3):
            x = _maxima(x, dim, kernel[dim - 2], stride[dim - 2], padding[dim - 2], self.ceil_mode)
        return x.contiguous()


def _maxima(x: Tensor, dim: int, kernel: int, stride: int, padding: int, ceil: bool) -> Tensor:
    """The greatest of each window along a dimension; a NaN is the greatest."""
    size = x.shape[dim]
    count = (size + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:  # no window begins in the padding
        count -= 1
    if count < 1:
        raise OpError(f"a window of {kernel} does not fit into {size} with padding {padding}")
    span = (count - 1) * stride + 1
    behind = max(0, span - 1 + kernel - padding - size)
    if padding or behind:
        edges = (padding, behind) if dim == 3 else (0, 0, padding, behind)
        x = nn.functional.pad(x, edges, value=-torch.inf)
    y = x[(slice(None),) * dim + (slice(0, span, stride),)]
    for first in range(1, kernel):
        y = torch.maximum(y, x[(slice(None),) * dim + (slice(first, first + span, stride),)])
    return y


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a plain convolution of one group per channel, its kernel, stride and padding equal
    in both directions."""
    return _is_square(module) and module.groups == module.in_channels == module.out_channels


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a plain convolution of one group, its kernel, stride and padding equal in both
    directions."""
    return _is_square(module) and module.groups == 1


def _is_square(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        type(module) is nn.Conv2d
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(size[0] == size[1] for size in (module.kernel_size, module.stride, module.padding))
    )


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a plain 1x1 convolution with stride 1, without padding, of one group."""
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
    )
