"""minireft: LoReFT, (IA)³ and NEFTune from scratch, on a transformer of one file and kernels that are checked."""

from . import ops, reference, tasks
from .adapters import (IA3, RED, Bank, Bottleneck, Classifier, ConsReFT, DiReFT, DoRA, LobiReFT, LoRA, LoReFT, NEFTune, NoReFT,
                       PrefixTuning, PromptTuning, SteeringVector, load_adapter)
from .adapters.compose import Subspace, weighted_sum
from .adapters.more.interchange import Interchange
from .checkpoint import load, save
from .data import Example
from .evaluation import classify, evaluate
from .formats.datasets import read_examples
from .generation import generate
from .model import Cache, Model, ModelConfig
from .recipes import recipe
from .tokenizer import Tokenizer
from .training import TrainConfig, train

__version__ = "0.1.0"
__all__ = ["Bank", "Bottleneck", "Cache", "Classifier", "ConsReFT", "DiReFT", "DoRA", "Example", "IA3", "Interchange", "LoRA",
           "LoReFT", "LobiReFT", "Model", "ModelConfig", "NEFTune", "NoReFT", "PrefixTuning", "PromptTuning", "RED",
           "SteeringVector", "Subspace", "Tokenizer", "TrainConfig", "classify", "evaluate", "generate", "load", "load_adapter",
           "ops", "read_examples", "recipe", "reference", "save", "tasks",
           "train", "weighted_sum"]
