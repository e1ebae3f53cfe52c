"""Edits: what they are, how they are read and checked."""

from pmet_lightning.edits.fields import RecordError as RecordError
from pmet_lightning.edits.readers import as_edits as as_edits
from pmet_lightning.edits.readers import read_edits as read_edits
from pmet_lightning.edits.readers import stream_edits as stream_edits
from pmet_lightning.edits.records import Edit as Edit
from pmet_lightning.edits.records import Probe as Probe
from pmet_lightning.edits.records import check_no_contradictions as check_no_contradictions
from pmet_lightning.edits.records import parse_record as parse_record
from pmet_lightning.edits.records import skip_written as skip_written
