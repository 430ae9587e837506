"""Tables that a person keeps, as rows of cells: CSV files and workbooks of Excel."""
