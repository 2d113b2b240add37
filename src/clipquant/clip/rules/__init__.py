"""The rules, one file each: a new one is its file and a line here."""

from clipquant.clip.rules.adagc import AdaGC as AdaGC
from clipquant.clip.rules.agc import AGC as AGC
from clipquant.clip.rules.autoclip import AutoClip as AutoClip
from clipquant.clip.rules.chain import Chain as Chain
from clipquant.clip.rules.indicator import Indicator as Indicator
from clipquant.clip.rules.norm import Norm as Norm
from clipquant.clip.rules.value import Value as Value
from clipquant.clip.rules.zclip import ZClip as ZClip
