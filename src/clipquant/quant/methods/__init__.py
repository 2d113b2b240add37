"""How codes are chosen: one file a method, and one line a method below."""

from clipquant.quant.methods.adaround import AdaRound
from clipquant.quant.methods.auto import Auto
from clipquant.quant.methods.base import Found, Method, Problem
from clipquant.quant.methods.distill import Distill
from clipquant.quant.methods.gptq import Gptq
from clipquant.quant.methods.hqq import Hqq
from clipquant.quant.methods.mse import Mse
from clipquant.quant.methods.rtn import Rtn

METHODS: dict[str, Method] = {
    method.name: method for method in (Auto(), Rtn(), Mse(), Hqq(), Gptq(), AdaRound(), Distill())
}

__all__ = [
    "METHODS",
    "AdaRound",
    "Auto",
    "Distill",
    "Found",
    "Gptq",
    "Hqq",
    "Method",
    "Mse",
    "Problem",
    "Rtn",
]
