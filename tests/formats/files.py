"""The files below the dialects, in one place: what tests read and write where `loralens.load` would ask for pairs."""

from loralens.formats.dialects.diffusers import KEY as KEY
from loralens.formats.dialects.diffusers import component as component
from loralens.formats.files import gguf_file as gguf_file
from loralens.formats.files.adapter_files import write_folder as write_folder
from loralens.formats.files.adapter_files import write_safetensors as write_safetensors
from loralens.formats.files.container import read_safetensors as read_safetensors
from loralens.formats.files.gguf_file import read_gguf as read_gguf
from loralens.formats.files.gguf_file import write_gguf as write_gguf
from loralens.formats.files.location import find_adapter as find_adapter
from loralens.formats.files.torch_pickle import read_pickle as read_pickle
from loralens.formats.models.checkpoint import model_config as model_config
from loralens.formats.models.checkpoint import shapes as shapes
from loralens.formats.models.checkpoint import weights as weights
from loralens.formats.models.model_files import model_files as model_files
