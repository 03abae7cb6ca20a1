"""Shows a web page on which regions are painted and captioned."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when a module here imports gradio
