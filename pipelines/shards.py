"""Writes an engine's records as Parquet or WebDataset too, in the form of `caption-dataset`."""

import dataclasses
import json
from pathlib import Path

from ..common.chat_endpoint import public_url
from . import places
from .captioners import ModelOptions
from .dataset import own_version
from .recipe import EngineRecipe
from .writers import CAPTIONS, ShardWriter, shards

STAGES = ("read", "decode", "caption")  # whose seconds the writer sums


class RecordShards:
    """Writes the lines of each part as a shard.

    A line has the key of its image as id; where an image has several, the further ones end in #1,
    #2 and so on. The shards of an earlier end of the run are removed first.
    """

    def __init__(self, recipe: EngineRecipe):
        options = recipe.output
        folder = Path(options.folder).absolute()
        self.images = folder if options.images == "link" else recipe.source.image_root
        with_bytes = options.shard_images == "bytes"
        self.write = ShardWriter(str(folder), options.shards, with_bytes, _provenance(recipe))
        for place in shards(str(folder), CAPTIONS) if (folder / CAPTIONS).is_dir() else ():
            places.remove_place(place)

    def add(self, lines: list[dict]):
        """Writes the lines of a part, where there are any."""
        rows, seen = [], {}
        for line in lines:
            number = seen[line["key"]] = seen.get(line["key"], -1) + 1
            key = f"{line['key']}#{number}" if number else line["key"]
            rows.append(self._row(line, key))
        if rows:
            self.write(rows)

    def _row(self, line: dict, key: str) -> dict:
        image = Path(self.images, line["image"])
        names = ("image", "mask_rles", "captions", "scores")
        return {
            **{name: line[name] for name in names},
            "id": key,
            "labels": line["categories"],
            "data": image.read_bytes() if self.write.with_bytes else None,
            "weights": None,
            "problems": [],
            **{f"{stage}_seconds": 0.0 for stage in STAGES},
        }


def _provenance(recipe: EngineRecipe) -> dict:
    """Returns what each row says about where its captions come from."""
    options = {} if recipe.captioner is None else dataclasses.asdict(recipe.captioner)
    name = "checkpoint" if isinstance(recipe.captioner, ModelOptions) else "model"
    if options.get("base_url"):
        options["base_url"] = public_url(options["base_url"])
    content = json.dumps(options, sort_keys=True)
    return {"model": options.get(name), "options": content, "version": own_version()}
