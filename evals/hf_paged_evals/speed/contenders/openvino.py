"""OpenVINO GenAI, if it is installed and a converted model is at hand."""

import functools
import importlib.util
import os

import torch

from hf_paged_evals.models.pair import ModelPair
from hf_paged_evals.speed.contenders.interface import Lengths

FOLDER = "HF_PAGED_OPENVINO_MODEL"


class OpenVINO:
    """Its continuous batching pipeline. The model must have been converted: the folder is in the environment."""

    name, batch, pool_owner = "OpenVINO GenAI", None, None

    def __init__(self, models: ModelPair):
        self.models = models

    def obstacle(self) -> str | None:
        if importlib.util.find_spec("openvino_genai") is None:
            return "openvino-genai is not installed"
        return None if os.environ.get(FOLDER) else f"{FOLDER} names no folder of a converted model"

    @functools.cached_property
    def _pipeline(self):
        import openvino_genai

        scheduling = openvino_genai.SchedulerConfig()
        scheduling.enable_prefix_caching = False
        return openvino_genai.ContinuousBatchingPipeline(os.environ[FOLDER], scheduling, "CPU")

    def generate(self, prompts: list[list[int]], lengths: Lengths) -> list[list[int]]:
        import openvino

        config = self._pipeline.get_config()
        config.do_sample, config.max_new_tokens, config.ignore_eos = False, lengths.new_tokens, not lengths.stops
        inputs = [openvino.Tensor(torch.tensor([prompt]).numpy()) for prompt in prompts]
        results = self._pipeline.generate(inputs, [config] * len(prompts))
        return [list(result.m_generation_ids[0]) for result in results]
