# Settings of a run in MMDetection's scope besides model, data and schedule.

_base_ = 'runtime.py'

default_scope = 'mmdet'
custom_imports = dict(
    imports=['pe_spatial.integrations.openmmlab', 'pe_spatial.engine', 'pe_spatial.detection'],
    allow_failed_imports=False)

default_hooks = dict(
    checkpoint=dict(save_best='auto', rule='greater'),  # the first metric: AP of boxes
    visualization=dict(type='DetVisualizationHook'))
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
