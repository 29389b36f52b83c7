"""The version of qpref, for every module that writes it: the package itself imports the whole interface"""

__version__ = "0.1.0"
