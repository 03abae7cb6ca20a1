"""PerceptionDLM as a Hugging Face Space: the page of `perceptiondlm web` over a model of the Hub.

`PERCEPTIONDLM_MODEL` names the model (and `PERCEPTIONDLM_SUBFOLDER` a folder in it); without it,
the small embedded one is used.
"""

import os

from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.serving.engine import Engine
from perceptiondlm.apps.web.launch import launch
from perceptiondlm.regions.segmenters import load_segmenter

model = os.environ.get("PERCEPTIONDLM_MODEL") or None
subfolder = os.environ.get("PERCEPTIONDLM_SUBFOLDER") or None
with Engine(RegionCaptioner.from_pretrained(model, subfolder=subfolder)) as engine:
    launch(
        engine,
        model or "perceptiondlm-tiny",
        segmenter=load_segmenter(),
        host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
        port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
    )
