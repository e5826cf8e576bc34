"""Keepers as typed parts: prune(model, preset, keep=vltprune.keep.ratio(0.5))."""

from ..layers.keepers.adaptive import Distortion, Entropy, Learned, Threshold, TopP
from ..layers.keepers.base import Outliers, RandomRatio
from ..layers.keepers.fixed import All, Count, Counts, Ratio, Remove, Share
from ..layers.keepers.trained import Above, FittedThreshold, RisingThreshold, SampledRatio
from .typed import typed_part

above = typed_part(Above)
all = typed_part(All)
count = typed_part(Count)
counts = typed_part(Counts)
distortion = typed_part(Distortion)
entropy = typed_part(Entropy)
fitted_threshold = typed_part(FittedThreshold)
learned = typed_part(Learned)
outliers = typed_part(Outliers)
random_ratio = typed_part(RandomRatio)
ratio = typed_part(Ratio)
remove = typed_part(Remove)
rising_threshold = typed_part(RisingThreshold)
sampled_ratio = typed_part(SampledRatio)
share = typed_part(Share)
threshold = typed_part(Threshold)
top_p = typed_part(TopP)
