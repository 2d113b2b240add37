"""Keywords that GradientClipCallback does not have, and what the same is called here."""

from __future__ import annotations

from clipquant.keywords import naming_keywords

# What other libraries call the limit, and the rule that it is here; {} stands for the value received.
_NORM, _VALUE, _EITHER = (
    "Norm({})",
    "Value({})",
    "Norm({}) to limit the norm or Value({}) each element",
)
RULES = {
    **dict.fromkeys(("max_norm", "norm", "max_grad_norm", "clip_norm", "grad_norm"), _NORM),
    **dict.fromkeys(("clip_grad_norm", "global_clipnorm", "clipnorm", "grad_clip_norm"), _NORM),
    **dict.fromkeys(
        ("value", "limit", "clip_value", "clipvalue", "max_value", "threshold"), _VALUE
    ),
    **dict.fromkeys(("clip_val", "gradient_clip_val", "grad_clip", "clip", "max"), _EITHER),
    **dict.fromkeys(("clip_factor", "clipping_threshold", "clip_ratio", "ratio"), "AGC({})"),
    "norm_type": "Norm(1.0, norm_type={})",
    "percentile": "AutoClip({})",
    "z": "ZClip(z={})",
    "gradient_clip_algorithm": 'Norm(1.0) for "norm" or Value(1.0) for "value"',
    "error_if_nonfinite": 'no rule but on_nonfinite="raise"',
    "error_on_nan": 'no rule but on_nonfinite="raise"',
}


naming_remedies = naming_keywords(RULES, "what clips is its first argument, give")
