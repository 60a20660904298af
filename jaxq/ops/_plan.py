"""`Plan`: a frozen record of what runs for one product.

`_decision.py` makes plans. The operations carry out plans and decide nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxq import kernels

Path = Literal[
    "dense",
    "codes",
    "weight_only",
    "weight_only_transposed",
    "dequantize",
    "attention",
]
Preparation = Literal[
    "dequantize_left", "scale_left", "scale_right", "quantize_left", "quantize_right"
]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one product is computed. `jaxq.explain` returns a plan; print it to read it.

    Attributes:
      path: one of

        - "dense": no operand is quantized; XLA multiplies arrays.
        - "codes": codes are multiplied by codes, integers in int32 or float8 in
          float32. float8 codes are also multiplied by a weight in a narrower format.
        - "weight_only": floats are multiplied by a weight that is decoded in blocks of
          rows.
        - "weight_only_transposed": as "weight_only", but the product contracts the
          kept axes of the weight.
        - "dequantize": a whole operand is dequantized first.
        - "attention": attention over a quantized KV cache (`KVCache.explain`).

      accumulate: dtype of the sums.
      swapped: True if the product has the weight as its left operand. If the activation
        is quantized first, it is the left operand in any case.
      reason: why this path was chosen, in words.
      kernel: the Pallas kernel that runs on `platform`: "tpu", "mosaic_gpu" or
        "triton"; "triton_int8" for int8 codes with one scale per row; "tpu_transposed"
        or "triton_transposed" if the kept axes of the weight are contracted;
        "ragged_tpu" or "ragged_triton" for `ragged_dot`; "codes_tpu" or "codes_triton"
        for codes of both operands with scales in groups; "attention_tpu" or
        "attention_triton" for attention; "xla" if no kernel runs.
      why_no_kernel: why no kernel runs; None if one runs.
      passed_over: the kernels of the platform that are tried before the kernel that
        runs, each with the reason why it does not run.
      platform: the platform that the kernel was chosen for; None if no platform was
        named.
      before: the steps that prepare operands before the product, in this order.
        "dequantize_left" dequantizes the left operand. "scale_left" and "scale_right"
        multiply the activation on that side by the `input_scale` of the weight.
        "quantize_left" and "quantize_right" quantize the activation on that side.
      activation: "dynamic" if the activation is quantized by its own extremes, "static"
        if it is quantized by a range from calibration, None if it stays in floats.
      activation_kernel: the kernel that quantizes the activation on `platform`,
        "activation_tpu" or "activation_triton"; "xla" if no kernel does; None if the
        activation is not quantized.
      why_no_activation_kernel: why no kernel quantizes the activation; None if one
        does, or if the activation is not quantized.
      outliers: columns of the activation are multiplied in floats if their largest
        magnitude is at least this number. None if there is no such threshold.
      outlier_product: the plan of the product of these columns. None if there is no
        such threshold.
      x_dtype: dtype of the other operand when it is multiplied by the weight. On the
        path "codes", it is the dtype of codes with one scale per row: int8, float8, or
        a wider float that holds float8 codes. None on paths that do not use this field.
      result: dtype of the product before the last cast. It is int32 if devices sum
        products of codes, which are scaled after the sum.
      num_devices: the number of devices that multiply parts. It is 1 if the operands
        are on one device or XLA partitions the product.
      part: the shapes of the parts that a device multiplies, such as
        "[4, 64] @ [64, 128]". For attention: its queries, slots and key heads. None if
        `num_devices` is 1.
      gathered: mesh axes over which devices get codes, scales or activations of other
        devices before the product.
      summed: mesh axes over which the products of the parts are summed, by an
        all-reduce of `result`.
      mapped: mesh axes over which `jax.vmap` maps. Devices along them multiply
        different elements of the mapped axis.

    Example:
      >>> import jax.numpy as jnp, jaxq
      >>> plan = jaxq.explain(jnp.ones((2, 32)), jaxq.quantize(jnp.eye(32), "int8"))
      >>> plan.path, plan.accumulate, plan.swapped
      ('weight_only', 'float32', False)
    """

    path: Path
    accumulate: str
    swapped: bool
    reason: str
    kernel: str = "xla"
    why_no_kernel: str | None = None
    passed_over: str = ""
    platform: str | None = None
    before: tuple[Preparation, ...] = ()
    activation: Literal["dynamic", "static"] | None = None
    activation_kernel: str | None = None
    why_no_activation_kernel: str | None = None
    outliers: float | None = None
    outlier_product: Plan | None = None
    x_dtype: str | None = None
    result: str = "float32"
    num_devices: int = 1
    part: str | None = None
    gathered: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    mapped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self._product() + self._on_devices()

    def _product(self) -> str:
        side = ", weight on the left" if self.swapped else ""
        text = f"{self.path} (accumulates in {self.accumulate}{side}): {self.reason}"
        if self.platform not in kernels.PLATFORMS:
            return text
        if self.activation_kernel is not None:
            text += f"; {self._activation_step()}"
        if self.why_no_kernel is not None:
            return f"{text}; in plain XLA on {self.platform}: {self.why_no_kernel}"
        others = f" ({self.passed_over})" if self.passed_over else ""
        return f"{text}; runs as the {self.kernel} kernel on {self.platform}{others}"

    def _on_devices(self) -> str:
        """What each device multiplies, and which collectives there are, in words."""
        if self.part is None:
            return ""
        text = f"; each of {self.num_devices} devices multiplies {self.part}"
        if self.gathered:
            text += f", after an all-gather over {', '.join(self.gathered)}"
        if self.summed:
            names = ", ".join(self.summed)
            text += f", before an all-reduce of {self.result} over {names}"
        return text

    def _activation_step(self) -> str:
        """What quantizes the activation, in words."""
        if self.why_no_activation_kernel is None:
            return f"the {self.activation_kernel} kernel quantizes the activation"
        return f"plain XLA quantizes the activation: {self.why_no_activation_kernel}"
