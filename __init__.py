"""PerceptionDLM: a multimodal diffusion language model that captions many image regions at once."""
