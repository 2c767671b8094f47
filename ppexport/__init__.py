"""ppexport"""
