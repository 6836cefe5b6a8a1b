# Procedures of the manual that replace records read the names of their files here, in the place that they have in
# upstream's image. Nothing runs this file.
FILES = (
    'v2_public_keys.json',
    'v3_deleted_public_keys.json',
    'v2.2_recipes.json',
    'v3.2_deleted_recipes.json',
    'v2.1_images.json',
    'v3.1_deleted_images.json',
    'v2.4_jobs.json',
    'v2.0_remote_build_nodes.json',
)
