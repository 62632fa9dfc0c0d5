"""FreezeOut inside training frameworks: one file a framework, each imported only by who uses it."""
