"""Distillation: a student learns from a teacher.

    loss = kd_loss(student_logits, teacher_logits, labels, temperature=2.0, alpha=0.5)

- `kd_loss` compares logits, of language models and of classifiers. `feature_loss` and
  `attention_loss` compare hidden states and attention maps. `response_loss` trains on
  text that a teacher wrote. All are pure functions.
- `generate` writes responses with a teacher, or with the student for on-policy
  distillation. `write_responses` stores a teacher's responses in a JSONL file.
- `LogitsCache` stores a teacher's most probable classes on disk.
- `make_step` makes a jitted training step with any of these losses.

A model is an nnx module, a pair `(apply, params)` or a function of the inputs.
"""

from jaxq.distillation._features import attention_loss, feature_loss, projection
from jaxq.distillation._generate import generate, response_mask
from jaxq.distillation._logits_cache import LogitsCache
from jaxq.distillation._losses import kd_loss, response_loss
from jaxq.distillation._responses import read_responses, responder, write_responses
from jaxq.distillation._step import Step as Step
from jaxq.distillation._step import StepState as StepState
from jaxq.distillation._step import make_step
from jaxq.distillation._top_k import TopK as TopK

__all__ = [
    "LogitsCache",
    "attention_loss",
    "feature_loss",
    "generate",
    "kd_loss",
    "make_step",
    "projection",
    "read_responses",
    "responder",
    "response_loss",
    "response_mask",
    "write_responses",
]
