"""The losses of xtoken in the trainers of other libraries, and teachers that others have captured."""

from . import distillkit as distillkit
from . import trl as trl
