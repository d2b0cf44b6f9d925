"""Installs the plugin for people who already have mmdet: ``pip install -e .``.

torch, mmcv, mmengine and mmdet are left out on purpose: pip would fetch an mmcv without its
compiled ops. ``mmdet_gdino_lora.environment`` checks them at import and names the command that
mends what is missing.
"""

from setuptools import find_packages, setup

setup(
    name='mmdet-gdino-lora',
    version='0.1.0',
    description="LoRA fine-tuning of Grounding DINO in MMDetection 3, with its paper's objective",
    license='Apache-2.0',
    # mmcv 2.1.0's setup.py cannot read its own version on Python 3.13.
    python_requires='>=3.10,<3.13',
    py_modules=['gdino_lora'],
    packages=find_packages(include=['mmdet_gdino_lora', 'mmdet_gdino_lora.*']),
    # .mim is where mmengine looks for a package's configs; here it links to configs/ and assets/.
    package_data={
        'mmdet_gdino_lora': [
            '.mim/*.yml',
            '.mim/configs/*',
            '.mim/assets/shapes/**/*',
            'report/*.html',
            'browse/*.html',
        ]
    },
    entry_points={'console_scripts': ['gdino-lora = gdino_lora:main']},
    extras_require={
        'onnx': ['onnx>=1.23', 'onnxruntime>=1.32', 'onnxscript>=0.7'],
        'playground': ['gradio>=6,<7'],
    },
    install_requires=[
        'transformers>=4.45,<6',
        'peft>=0.16,<1',
        'safetensors>=0.4.1',
        'scipy>=1.10',
        'numpy>=1.23.5',
        'cachetools>=5',
        'packaging',
    ],
)
