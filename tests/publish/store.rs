//! Faulty and hanging stores: answers and waits have limits, and what a store answers is
//! verified.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ims_sshd::sys::process::output_within;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::ims_server::{Fault, ImsServer};
use testbed::job::*;
use testbed::s3_server::{Bucket, Closed, Gate, ask};
use testbed::*;

use crate::answers::serve;

/// Answers like an empty store, except for requests that `answer_to` answers.
fn store(answer_to: impl Fn(&str) -> Option<(u16, Option<String>)> + Send + Sync + 'static) -> String {
    serve(move |asked, _| {
        answer_to(asked).unwrap_or_else(|| match asked.split(' ').next() {
            Some("HEAD") => (404, Some(String::new())),
            Some("POST") => (200, Some("<R><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId></R>".into())),
            _ => (200, Some(String::new())),
        })
    })
}

/// An upload to this server, and its directory.
fn upload(endpoint: &str, further: &[(&'static str, String)]) -> (tempfile::TempDir, Command) {
    let (dir, tree, squashfs) = packed_image();
    let mut variables = vec![
        ("S3_ENDPOINT", endpoint.to_owned()),
        ("S3_BUCKET", "bucket".into()),
        ("S3_ACCESS_KEY", "access".into()),
        ("S3_SECRET_KEY", "secret".into()),
    ];
    variables.extend_from_slice(further);
    let mut command = ims_sshd(&["upload", "--name", "compute", "--archive"], &variables);
    command.args([&squashfs, &tree]).current_dir(dir.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    (dir, command)
}

fn ended(child: Child) -> Output {
    output_within(child, Duration::from_mins(1)).unwrap().expect("it does not end")
}

#[test]
fn endless_answers_of_a_store_are_cut_off() {
    for (endless, status, reason) in [
        ("PUT ", 200, "longer than 4 MiB"),
        ("PUT ", 403, "answers 403"),
        ("DELETE ", 200, "longer than 4 MiB"),
        ("GET ", 200, "longer than 4 MiB"),
        ("GET ", 403, "answers 403"),
    ] {
        // Objects are deleted only after a failure.
        let fails = if endless == "PUT " { "nothing" } else { "PUT " };
        let server = store(move |asked| match asked {
            asked if asked.starts_with(endless) => Some((status, None)),
            asked if asked.starts_with(fails) => Some((403, Some(String::new()))),
            _ => None,
        });
        let began = Instant::now();
        let (_dir, mut command) = upload(&server, &[]);
        let output = ended(command.spawn().unwrap());
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(reason), "{endless} {status}: {said}");
        assert!(said.len() < 10_000 && began.elapsed() < Duration::from_secs(20), "{endless}: {}", said.len());
    }
}

/// A proxy of the store of `bucket` that hangs from some request on.
fn hangs(bucket: &Bucket, has_come: impl Fn(&str) -> bool + Send + Sync + 'static) -> (String, Arc<AtomicBool>) {
    let hung = Arc::new(AtomicBool::new(false));
    let port = bucket.endpoint.rsplit(':').next().unwrap().parse().unwrap();
    let seen = hung.clone();
    let server = serve(move |asked, _| {
        if has_come(asked) {
            seen.store(true, Ordering::Relaxed);
        }
        while seen.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_secs(1));
        }
        let (method, path) = asked.split_once(' ').unwrap();
        let answer = ask(port, method, path, b"");
        (answer.status, Some(text(answer.body)))
    });
    (server, hung)
}

#[test]
fn hanging_store_is_given_up_after_the_limits() {
    let bucket = Bucket::new();
    let (server, hung) = hangs(&bucket, |asked| asked.starts_with("PUT "));
    let variables = [("S3_BUCKET", bucket.name.clone()), ("IMS_RETRY_LIMIT", "5".into())];
    let (_dir, mut command) = upload(&server, &variables);
    let began = Instant::now();
    let output = ended(command.spawn().unwrap());
    let said = text(&output.stderr);
    assert!(hung.load(Ordering::Relaxed) && output.status.code() == Some(1), "{said}");
    assert!(said.contains("no progress for"), "{said}");
    // The clock of the limit starts when the first attempt has sent everything.
    let tried = seconds_tried(&said);
    assert!((5..=began.elapsed().as_secs() + 1).contains(&tried), "{tried}, {:?}: {said}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(14), "{:?}: {said}", began.elapsed());
    assert_eq!(
        said.matches("trying again").count(),
        1,
        "once, while it is uploaded and while that is rolled back: {said}"
    );
}

#[test]
fn signal_ends_the_wait_for_hanging_servers() {
    for ims_hangs in [false, true] {
        let (bucket, ims) = (Bucket::new(), ImsServer::start());
        let (server, hung) = hangs(&bucket, |asked| asked.starts_with("PUT "));
        let mut variables = vec![
            ("S3_BUCKET", bucket.name.clone()),
            ("IMS_STALL_LIMIT", "100".into()),
            ("IMS_RETRY_LIMIT", "100".into()),
        ];
        if ims_hangs {
            variables.extend(ims.variables().into_iter().filter(|(name, _)| *name != "IMS_JOB_ID"));
        }
        let (_dir, mut command) = upload(&server, &variables);
        let child = command.spawn().unwrap();
        wait_until("the store to hang", || hung.load(Ordering::Relaxed));
        if ims_hangs {
            ims.fail("GET /images", Fault::Silence);
        }
        let began = Instant::now();
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        let output = ended(child);
        assert_eq!(output.status.code(), Some(143), "{output:?}");
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}: {}", began.elapsed(), text(&output.stderr));
    }
}

#[test]
fn record_is_kept_while_the_store_does_not_delete_objects() {
    let (bucket, ims) = (Bucket::new(), ImsServer::start());
    let gate = Gate::start(usize::MAX, Closed::Undeleted);
    let mut variables = bucket.variables();
    variables.extend(ims.variables().into_iter().filter(|(name, _)| *name != "IMS_JOB_ID"));
    let (dir, mut command) = upload(&gate.endpoint, &variables);
    command.env("S3_ENDPOINT", &gate.endpoint);
    ims.fail("PATCH /images", Fault::Status(400));
    let output = ended(command.spawn().unwrap());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("it is still there") && said.contains("stays in IMS"), "{said}");
    assert_eq!((ims.state().images.len(), bucket.keys().len()), (1, 5), "{said}");
    assert!(dir.path().join(".ims-sshd.publication").exists());
    let id = ims.state().images.keys().next().unwrap().clone();
    // The next run continues with the image.
    let output = ended(command.env("S3_ENDPOINT", &bucket.endpoint).spawn().unwrap());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(report(&output)["ims_image_record"]["id"], *id);
    assert_eq!((ims.state().images.len(), bucket.keys().len()), (1, 5));
}

#[test]
fn store_without_an_endpoint_is_refused_with_the_variables_to_set() {
    let (_dir, mut command) = upload("", &[]);
    let output = ended(command.spawn().unwrap());
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let said = text(&output.stderr);
    assert!(["S3_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_REGION"].iter().all(|name| said.contains(name)), "{said}");
}

#[test]
fn store_that_nothing_listens_for_is_tried_for_the_retry_limit_as_a_whole() {
    let (dir, _, squashfs) = packed_image();
    let endpoint = format!("http://127.0.0.1:{}", free_port());
    let (store, limit) =
        ([("S3_ENDPOINT", endpoint.clone()), ("S3_ACCESS_KEY", "a".into()), ("S3_SECRET_KEY", "s".into())], 4);
    let customize = || {
        let mut command = ims_sshd(&["customize"], &store);
        command
            .arg(&squashfs)
            .args(["--output", "s3://bucket", "--work", "work", "--", "true"])
            .current_dir(dir.path());
        command
    };
    let prepare = || {
        let mut command = ims_sshd(&["prepare"], &[]);
        command.args(["w", &format!("{endpoint}/image")]).current_dir(dir.path());
        command
    };
    let (_upload_dir, mut upload) = upload(&endpoint, &[]);
    for command in [&mut customize(), &mut prepare(), &mut upload] {
        command.env("IMS_RETRY_LIMIT", limit.to_string()).stderr(Stdio::piped());
        let mut child = Ended::new(command.spawn().unwrap());
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        let first = lines.find(|line| line.contains("; trying again for ")).expect("it is tried again");
        let began = Instant::now();
        let said = lines.collect::<Vec<_>>().join("\n");
        let took = began.elapsed();
        assert!(!child.wait().unwrap().success(), "{first}\n{said}");
        // A busy machine takes its time; without a limit as a whole it was more than three times the limit.
        assert!(seconds_tried(&said) >= limit && took < Duration::from_secs(3 * limit - 1), "{took:?}: {said}");
    }
}
