#!/bin/bash
echo debian > /etc/hostname
