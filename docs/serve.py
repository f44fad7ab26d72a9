"""An exported detector behind HTTP: `pip install fastapi uvicorn`, then

python docs/serve.py EXPORTED --port 8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/detect

Requests that arrive together run as one batch. Too many waiting requests get 503, too large images 413.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import decode_rgb, open_image
from pe_spatial.predict.results import Detections
from pe_spatial.runtime.detection import ExportedDetector
from pe_spatial.runtime.manifest import read_manifest

MAX_BYTES, MAX_PIXELS = 20 * 2**20, 4096 * 4096
MAX_WAITING, MAX_BATCH, WAIT = 64, 8, 0.005
"""Requests that wait, images in one call, seconds to wait for more of them."""


def pixels(data: bytes) -> int:
    """Return how many pixels an image has by its header, before it is decoded; 0 if it has none that can be read."""
    try:
        with open_image(data) as image:
            return image.width * image.height
    except Exception:  # `decode_rgb` says what it is
        return 0


def create_app(detector: ExportedDetector) -> FastAPI:
    """Return the server; one thread runs the model."""
    waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[Detections]]] = asyncio.Queue(MAX_WAITING)
    pool = ThreadPoolExecutor(1)

    async def answer(batch: list[tuple[np.ndarray, asyncio.Future[Detections]]]) -> None:
        call = partial(detector, [image for image, _ in batch], batch_size=MAX_BATCH)
        try:
            results = await asyncio.get_running_loop().run_in_executor(pool, call)
        except Exception as error:
            if len(batch) > 1:  # one image fails, and the others should not
                for one in batch:
                    await answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():  # a client that went away has cancelled it
                future.set_result(result)

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(WAIT)
            while len(batch) < MAX_BATCH and not waiting.empty():
                batch.append(waiting.get_nowait())
            await answer(batch)

    @asynccontextmanager
    async def run_worker(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=run_worker)

    @app.post("/detect")
    async def detect(request: Request, score: float = 0.3) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdigit():
            return Response("a content-length is needed", 411)
        if int(length) > MAX_BYTES:
            return Response(f"at most {MAX_BYTES} bytes", 413)
        data = await request.body()
        if pixels(data) > MAX_PIXELS:
            return Response(f"at most {MAX_PIXELS} pixels", 413)
        try:
            image = await asyncio.to_thread(decode_rgb, data, "the body")
        except DatasetError as error:
            return Response(str(error), 400)
        future: asyncio.Future[Detections] = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait((image, future))
        except asyncio.QueueFull:
            return Response("busy; try again later", 503)
        try:
            found = (await future).filter(score=score)
        except DatasetError as error:  # too large for the model's canvas
            return Response(str(error), 400)
        objects = [
            dict(name=name, score=round(float(value), 4), box=[round(float(side), 2) for side in box])
            for name, value, box in zip(found.names, found.scores, found.boxes, strict=True)
        ]
        return Response(json.dumps(objects), media_type="application/json")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        if read_manifest(args.folder).task != "detection":
            raise ConfigError(f"{args.folder} is no exported detector; give one")
        detector = ExportedDetector(args.folder, threads=args.threads)
    except ConfigError as error:
        parser.error(str(error))
    uvicorn.run(create_app(detector), host="127.0.0.1", port=args.port)
