"""Layers that several families share: convolution, BatchNorm (which can be folded into it), dense and LayerNorm.

Images are NHWC; parameters are float32; `dtype` is what a layer computes in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.models.policy import Policy
from jaxft.ops.batch_norm import NormOptions, batch_norm
from jaxft.ops.conv import conv as convolve
from jaxft.ops.conv import conv_and_add
from jaxft.ops.dense import dense
from jaxft.ops.elementwise import scale_kernel
from jaxft.ops.formulation import Formulation
from jaxft.ops.layer_norm import layer_norm_and_input

EPSILON = 1e-5  # of BatchNorm

# torch: kaiming_normal_(mode="fan_out", nonlinearity="relu")
conv_kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A convolution padded by size // 2 on each side. BatchNorm that is folded into it gives it a bias."""

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32
    formulation: Formulation = "plain"
    folded: bool = False  # the parameters contain its norm: see fold.py
    use_bias: bool = False  # it has a bias of its own

    @nn.compact
    def __call__(
        self, x: jax.Array, norm: "BatchNorm | None" = None, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array:
        """Convolves x. norm: folded into the convolution. A `shortcut` and a ReLU follow only if it has a bias."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", conv_kernel_init, shape, jnp.float32)
        bias = None
        if self.folded or self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if norm and not self.folded:
            kernel, bias = norm.folded_into(kernel, bias)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        options = self.stride, self.groups, self.formulation
        if bias is None:
            return convolve(x, kernel, *options)
        return conv_and_add(x, kernel, bias, shortcut, relu, *options)


class BatchNorm(nn.Module):
    """torch's BatchNorm2d, which normalises with the biased variance and averages the unbiased one.

    `policy.batch_norm` selects the statistics in training: of this device's share of the batch ("update"), of the
    whole batch over the devices ("sync"), or the running ones ("frozen").
    """

    features: int
    policy: Policy = Policy()
    dtype: Any = jnp.float32
    formulation: Formulation = "plain"
    zero_init: bool = False  # its scale is 0 at first, not 1

    def setup(self) -> None:
        shape = (self.features,)
        init = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        self.scale = self.param("scale", init, shape, jnp.float32)
        self.bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        self.running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        self.running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

    def is_frozen(self) -> bool:
        return self.policy.norm_is_frozen("/".join(self.path))

    def folded_into(self, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Folds the norm with its running statistics into a convolution; returns its new kernel and bias."""
        norm = FoldedNorm(self.scale, self.bias, self.running_mean.value, self.running_var.value)
        return fold(kernel, bias, norm, self.formulation)

    def __call__(
        self, x: jax.Array, mask: jax.Array | None, relu: bool = False, shortcut: jax.Array | None = None
    ) -> jax.Array:
        """Normalises x by its own statistics and updates the running ones; then adds `shortcut` and applies a ReLU.

        mask: (N,), 0 for padding.
        """
        axis_name = self.policy.axis_name if self.policy.batch_norm == "sync" else None
        options = NormOptions(relu, axis_name, EPSILON, self.formulation)
        y, (mean, var, count) = batch_norm(x, shortcut, self.scale, self.bias, self.running_mean.value, mask, options)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A device whose share is all padding has no statistics to contribute.
        weight = 0 if self.is_initializing() else self.policy.norm_momentum * (count > 0)
        self.running_mean.value += weight * (mean - self.running_mean.value)
        self.running_var.value += weight * (unbiased - self.running_var.value)
        return y.astype(self.dtype)


class FoldedNorm(NamedTuple):
    """The parameters and running statistics of a BatchNorm, (F,) each."""

    scale: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array


def fold(
    kernel: jax.Array, bias: jax.Array | None, norm: FoldedNorm, formulation: Formulation = "plain"
) -> tuple[jax.Array, jax.Array]:
    """Folds BatchNorm into a convolution: its scale into the kernel, its shift into the bias (F,)."""
    slope = norm.scale * jax.lax.rsqrt(norm.var + EPSILON)
    mean = norm.mean if bias is None else norm.mean - bias
    return scale_kernel(kernel, slope, formulation), norm.bias - mean * slope


class Dense(nn.Module):
    """A layer with a kernel and a bias: dense, or what `apply_kernel` computes with them."""

    shape: tuple[int, ...]  # of the kernel
    dtype: Any = jnp.float32
    formulation: Formulation = "plain"
    kernel_init: Callable[..., jax.Array] = nn.initializers.normal(0.02)
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros
    apply_kernel: Callable[[jax.Array, jax.Array, Formulation, jax.Array], jax.Array] = dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, self.shape, jnp.float32)
        bias = self.param("bias", self.bias_init, self.shape[-1:], jnp.float32)
        return self.apply_kernel(x.astype(self.dtype), kernel.astype(self.dtype), self.formulation, bias)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with statistics in at least float32."""

    epsilon: float
    dtype: Any = jnp.float32
    formulation: Formulation = "plain"

    @nn.compact
    def with_input(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the normalised x, and x for a shortcut: see ops/layer_norm.py."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return layer_norm_and_input(x, scale, bias, self.epsilon, self.dtype, self.formulation)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.with_input(x)[0]
