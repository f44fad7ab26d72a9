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

from pe_spatial.errors import DatasetError
from pe_spatial.images import decode_rgb
from pe_spatial.predict.results import Detections
from pe_spatial.runtime.detection import ExportedDetector

MAX_BYTES, MAX_PIXELS = 20 * 2**20, 4096 * 4096
MAX_WAITING, MAX_BATCH, WAIT = 64, 8, 0.005
"""Requests that wait, images in one call, seconds to wait for more of them."""


def create_app(detector: ExportedDetector) -> FastAPI:
    """Return the server; one thread runs the model."""
    waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[Detections]]] = asyncio.Queue(MAX_WAITING)
    pool = ThreadPoolExecutor(1)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(WAIT)
            while len(batch) < MAX_BATCH and not waiting.empty():
                batch.append(waiting.get_nowait())
            images = [image for image, _ in batch]
            try:
                results = await loop.run_in_executor(pool, partial(detector, images, batch_size=MAX_BATCH))
            except Exception as error:
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), result in zip(batch, results, strict=True):
                if not future.cancelled():
                    future.set_result(result)

    @asynccontextmanager
    async def run_worker(_: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=run_worker)

    @app.post("/detect")
    async def detect(request: Request, score: float = 0.3) -> Response:
        if int(request.headers.get("content-length", 0)) > MAX_BYTES:
            return Response(f"at most {MAX_BYTES} bytes", 413)
        try:
            image = decode_rgb(await request.body(), "the body")
        except DatasetError as error:
            return Response(str(error), 400)
        if image.shape[0] * image.shape[1] > MAX_PIXELS:
            return Response(f"at most {MAX_PIXELS} pixels", 413)
        future: asyncio.Future[Detections] = asyncio.get_running_loop().create_future()
        try:
            waiting.put_nowait((image, future))
        except asyncio.QueueFull:
            return Response("busy; try again later", 503)
        found = (await future).filter(score=score)
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
    uvicorn.run(create_app(ExportedDetector(args.folder, threads=args.threads)), host="127.0.0.1", port=args.port)
