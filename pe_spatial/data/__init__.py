"""Own datasets in the forms that annotation tools write: found out, checked, and brought to COCO's form.

The forms are parsed here, in about a page each, because the libraries that read several of them change the objects:
supervision 0.31 draws polygons as bitmaps and approximates these again, globox 2.9 keeps boxes alone, datumaro 1.13
rounds coordinates to 0.01 pixels in float32 (and excludes Pillow 13), and pycocotools reads COCO alone. None of them
finds images of another machine or explains what is wrong with a file.
"""

from pe_spatial.data.dataset import OwnDataset, Split, open_dataset, write_splits

__all__ = ["OwnDataset", "Split", "open_dataset", "write_splits"]
