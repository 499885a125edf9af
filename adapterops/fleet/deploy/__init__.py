"""From a plan to a folder that an engine serves: files, routes, flags, memory, proposals."""
