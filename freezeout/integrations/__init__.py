"""FreezeOut in training frameworks: one module each, which imports that framework.

from freezeout.integrations.lightning import FreezeOutCallback
from freezeout.integrations.transformers import FreezeOutTrainerCallback
"""
