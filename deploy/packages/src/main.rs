//! `ims-packages NAME VERSION STAGE OUTPUT` writes the packages of NAME into the directory OUTPUT, and prints their
//! paths. `SOURCE_DATE_EPOCH` is the time of their files.

use std::process::ExitCode;

use ims_packages::{Build, PACKAGES, Result, write};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<()> {
    let [name, version, stage, output] = words else {
        return Err("usage: ims-packages NAME VERSION STAGE OUTPUT".into());
    };
    let names = PACKAGES.map(|package| package.name).join(", ");
    let known = PACKAGES.iter().find(|package| package.name == *name);
    let package = known.ok_or_else(|| format!("there is no package '{name}', only {names}"))?;
    // 2020-01-01
    let epoch = std::env::var("SOURCE_DATE_EPOCH").map_or(Ok(1_577_836_800), |text| text.parse())?;
    let build = Build { version, epoch, level: 6, stage: stage.as_ref(), output: output.as_ref() };
    for path in write(package, &build)? {
        println!("{}", path.display());
    }
    Ok(())
}
