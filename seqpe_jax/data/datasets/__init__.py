"""The classes that read data sets, one module each; `data.registry` names them."""
