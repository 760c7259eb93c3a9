"""The compression methods. Each has one file, one class and one name on the command line.

To add a method, write its file and add one line here.
"""

from vlmzip.methods.adaptive_visionzip import AdaptiveVisionZip as AdaptiveVisionZip
from vlmzip.methods.cdpruner import CDPruner as CDPruner
from vlmzip.methods.chain import Chain as Chain
from vlmzip.methods.dart import DART as DART
from vlmzip.methods.dfmr import DFMR as DFMR
from vlmzip.methods.divprune import DivPrune as DivPrune
from vlmzip.methods.downsample import Downsample as Downsample
from vlmzip.methods.evs import EVS as EVS
from vlmzip.methods.fastervlm import FasterVLM as FasterVLM
from vlmzip.methods.fastv import FastV as FastV
from vlmzip.methods.hiprune import HiPrune as HiPrune
from vlmzip.methods.holov import HoloV as HoloV
from vlmzip.methods.kmeans import KMeans as KMeans
from vlmzip.methods.llavolta import LLaVolta as LLaVolta
from vlmzip.methods.mmtok import MMTok as MMTok
from vlmzip.methods.no_compression import NoCompression as NoCompression
from vlmzip.methods.pixelprune import PixelPrune as PixelPrune
from vlmzip.methods.pool2d import Pool2d as Pool2d
from vlmzip.methods.prumerge import PruMerge as PruMerge
from vlmzip.methods.prunesid import PruneSID as PruneSID
from vlmzip.methods.pyramiddrop import PyramidDrop as PyramidDrop
from vlmzip.methods.qformer import QFormer as QFormer
from vlmzip.methods.random_tokens import RandomTokens as RandomTokens
from vlmzip.methods.scope import SCOPE as SCOPE
from vlmzip.methods.sparsevlm import SparseVLM as SparseVLM
from vlmzip.methods.tome import ToMe as ToMe
from vlmzip.methods.vcc import VCC as VCC
from vlmzip.methods.vidcom2 import VidCom2 as VidCom2
from vlmzip.methods.visionzip import VisionZip as VisionZip
from vlmzip.methods.vispruner import VisPruner as VisPruner
from vlmzip.methods.zoo_prune import ZOOPrune as ZOOPrune
