"""Results in and out: the authors' JSON files, flat CSV and parquet, and joining runs of one plan.

Knows ledgers and run folders; generates and judges nothing.
"""

from steerback.interchange.authors import Imported, export_authors, import_authors
from steerback.interchange.flat import export_flat
from steerback.interchange.merge import Merged, merge

__all__ = ["FORMATS", "Imported", "Merged", "export_authors", "export_flat", "import_authors", "merge"]

FORMATS = ("authors", "parquet", "csv")
