"""Read trajectories of other libraries as plain data, by their documented fields; none of them has to be installed.

``files.import_files`` reads files and ``files.import_record`` one record; the other modules have a function a format.
"""
